"""The settings that a plan is made of: each method says which it can be planned with."""

from __future__ import annotations

from typing import Any

from ...artifacts import Artifact, ArtifactError, KvcalError
from ...runtime.methods import METHODS

Setting = dict[str, Any]
"""A method and its parameters: {"method": "spectral", "keep": 0.0625, …}."""

KEEP = (1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4)


def planned_methods() -> list[str]:
    return [name for name, method in METHODS.items() if method.planning_grid(64, KEEP)]


def check_method(method: str) -> None:
    """Raise KvcalError for one that has no grid."""
    if method not in planned_methods():
        raise KvcalError(f"no plans for method {method!r}: choose among {', '.join(planned_methods())}")


def check_fitted(method: str, artifact: Artifact, place: str) -> None:
    """Raise KvcalError where an artifact lacks what a method decodes with.

    Args:
        place: its folder, as commands take it.
    """
    for layer in artifact.full_layers[:1]:
        first = METHODS[method](**METHODS[method].planning_grid(layer.head_dim, KEEP)[0])
        try:
            first.bind(layer.index, layer.head_dim, artifact)
        except ArtifactError as error:
            raise ArtifactError(f"{str(error).replace('ARTIFACT', place)}, then plan") from None


def bases(method: str) -> list[Setting]:
    """The settings by which a layer's basis is chosen, all else being equal; none where there is no choice."""
    return [{"method": method, **basis} for basis in METHODS[method].planning_bases]


def grid(method: str, head_dim: int, basis: Setting | None = None) -> list[Setting]:
    """The settings of a layer between which bytes are dealt.

    Args:
        basis: the best of `bases`, of which the basis is taken.
    """
    return [{"method": method, **(basis or {}), **each} for each in METHODS[method].planning_grid(head_dim, KEEP)]
