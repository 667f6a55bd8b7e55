"""The settings that a plan is made of."""

from __future__ import annotations

import itertools
from typing import Any

from ...artifacts import Artifact, KvcalError
from ...kernels.codes import fields_of
from ...runtime.methods.spectral import STEP

Setting = dict[str, Any]
"""A method and its parameters: {"method": "spectral", "keep": 0.0625, …}."""

METHODS = ("spectral", "loki", "clusterkv")
KEEP = (1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4)
CODES = ((0.25, 2), (0.5, 2), (1.0, 2), (0.5, 4))
"""Of `spectral`: share of the head dim, and bits of each dimension."""
RICHEST = ((1.0, 2), 1 / 2)
"""Of `spectral`, a code and `keep`: for what is left of a large budget."""
BASES = tuple({"stage": stage, "basis": basis} for basis, stage in itertools.product(("score", "pca"), ("post", "pre")))


def check_method(method: str) -> None:
    """Raise KvcalError for one that has no grid."""
    if method not in METHODS:
        raise KvcalError(f"no plans for method {method!r}: choose among {', '.join(METHODS)}")


def check_needs(method: str, artifact: Artifact, place: str) -> None:
    """Raise KvcalError where an artifact lacks what a method decodes with.

    Args:
        place: its folder, as commands take it.
    """
    if method == "spectral" and "codebook" not in artifact.stages:
        raise KvcalError(
            f"{artifact.name}: has no codebook, which spectral decodes with: make it with `calibrate cluster {place} "
            "--metric joint`, then plan"
        )


def bases(method: str) -> list[Setting]:
    """The settings by which a layer's basis is chosen, all else being equal; none where there is no choice."""
    if method != "loki":
        return []
    return [{"method": method, "rank": 0.25, "keep": 1 / 16, "select": "group", **basis} for basis in BASES]


def grid(method: str, head_dim: int, basis: Setting | None = None) -> list[Setting]:
    """The settings of a layer between which bytes are dealt.

    Args:
        basis: the stage and basis of the best of `bases`.
    """
    if method == "spectral":
        of_codes = dict.fromkeys(
            (_rank(head_dim, share, bits), bits, keep)
            for (share, bits), keep in (*itertools.product(CODES, KEEP), RICHEST)
        )
        # Half as many rows of 16 bits are as many bytes, and lose more (docs/results/real.md, bits of rows).
        return [
            {"method": method, "rank": rank, "bits": bits, "rows": 8, "keep": keep} for rank, bits, keep in of_codes
        ]
    if method == "loki":
        ranks = (0.0625, 0.125, 0.25, 0.5)
        return [
            {"method": method, **(basis or {}), "rank": rank, "keep": keep, "select": "group"}
            for rank, keep in itertools.product(ranks, KEEP)
        ]
    return [
        {"method": method, "keep": keep, "tokens_per_cluster": tokens, "sinks": 4, "window": 64}
        for keep, tokens in itertools.product(KEEP, (16, 32, 80))
    ]


def _rank(head_dim: int, share: float, bits: int) -> int:
    """What codes can be packed in, see `coded_rank`."""
    step = STEP if head_dim % STEP == 0 else fields_of(bits)
    return min(head_dim, max(step, round(head_dim * share / step) * step))
