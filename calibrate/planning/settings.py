"""The settings that a plan is made of."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ...artifacts import KvcalError
from .points import Setting

KEEP = (1 / 256, 1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4)
BASES = tuple({"stage": stage, "basis": basis} for basis, stage in itertools.product(("score", "pca"), ("post", "pre")))
METHODS = ("spectral", "loki", "clusterkv")


def bases(method: str, head_dim: int) -> list[Setting]:
    """The settings by which a layer's basis is chosen, all else being equal; none where the method has no basis."""
    if method == "spectral":
        middle = {"method": method, "rank": _rank(head_dim, 0.25), "bits": 4, "keep": 1 / 32, "refine": 1.0}
    elif method == "loki":
        middle = {"method": method, "rank": 0.25, "keep": 1 / 16, "select": "group"}
    else:
        return []
    return [{**middle, **basis} for basis in BASES]


def grid(method: str, head_dim: int, basis: Setting) -> list[Setting]:
    """The settings of a layer between which bytes are dealt.

    Args:
        basis: the stage and basis of the best of `bases`.

    Raises:
        KvcalError: a method that has no grid.
    """
    if method == "spectral":
        ranks = dict.fromkeys(_rank(head_dim, share) for share in (0.125, 0.25, 0.5, 1.0))
        return [
            {"method": method, **basis, "rank": rank, "bits": bits, "keep": keep, "tokens_per_cluster": tokens, **how}
            for rank, bits, keep, (tokens, how) in itertools.product(ranks, (2, 4), KEEP, _READING)
        ]
    if method == "loki":
        return [
            {"method": method, **basis, "rank": rank, "keep": keep, "select": "group"}
            for rank, keep in itertools.product((0.0625, 0.125, 0.25, 0.5), KEEP)
        ]
    if method == "clusterkv":
        return [
            {"method": method, "keep": keep, "tokens_per_cluster": tokens, "sinks": 4, "window": 64}
            for keep, tokens in itertools.product(KEEP, (16, 32, 80))
        ]
    raise KvcalError(f"no plans for method {method!r}: choose among {', '.join(METHODS)}")


_FLAT: Setting = {"refine": 1.0}
_READING: Sequence[tuple[int, Setting]] = (
    (16, _FLAT),
    (80, _FLAT),
    (16, {"refine": 0.125, "flat_below": 0}),
    (32, {"refine": 0.125, "flat_below": 0}),
)
"""Tokens per cluster, and whether codes are read in one level or two."""


def _rank(head_dim: int, share: float) -> int:
    """A multiple of 16 where the head dim is one."""
    step = 16 if head_dim % 16 == 0 else 4
    return min(head_dim, max(step, round(head_dim * share / step) * step))
