"""What type checkers and editors know of `compress(model, artifact, method, **settings)`.

A value may be one for all layers, a list with one entry per layer, or a mapping from ranges of layers to values, see
`settings.py`, which also says in a line what does not fit. What each setting means stands in its method's file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias, TypedDict, TypeVar

if TYPE_CHECKING:
    from .cla.sharing_map import SharingMap

Value = TypeVar("Value")
ByLayer: TypeAlias = Value | Sequence[Value] | Mapping[str, Value]
"""For all layers, as a list with one entry per layer, or by range of layers: {"0-1": 64, "2-": 32}."""

MethodName: TypeAlias = Literal[
    "full",
    "spectral",
    "loki",
    "exact_topk",
    "clusterkv",
    "quest",
    "sparq",
    "streaming",
    "h2o",
    "snapkv",
    "subgen",
    "xcla",
    "cla",
    "plan",
]
"""A name in METHODS; "cla", alone or before another ("cla+loki"); "plan": the artifact's."""
MethodArgument: TypeAlias = (
    MethodName | str | Sequence[str | Mapping[str, object]] | Mapping[str, str | Mapping[str, object]] | None
)
"""None: the artifact's plan, if it has one, else "loki"."""


class DecodeSettings(TypedDict, total=False):
    """Parameters of the methods, and of `cla`; `decode` has a `seed` of its own, its sampler's."""

    dense_layers: int
    """Of every method: so many first layers are `full`."""
    dense_below: ByLayer[int]
    """Of every method but full and xcla."""
    keep: ByLayer[float | int]
    """Of every method but full, subgen and xcla: a fraction of the tokens (0.25), or a count (1024)."""
    rank: ByLayer[float | int | str]
    """Of spectral, loki and sparq: a fraction of the head dim, a count, or "variance:0.9" (not sparq)."""
    sinks: ByLayer[int]
    """Of spectral, loki, clusterkv, quest, streaming and subgen."""
    recent: ByLayer[int]
    """Of spectral, loki, quest and xcla."""
    select: ByLayer[str]
    """Of spectral, loki, exact_topk, clusterkv, quest and sparq."""
    choice: ByLayer[str]
    """Of spectral and loki."""
    sample: ByLayer[int]
    """Of spectral and loki."""
    bits: ByLayer[int]
    """Of spectral."""
    rows: ByLayer[int | str]
    """Of spectral."""
    residual: ByLayer[bool]
    """Of spectral."""
    offload: ByLayer[str]
    """Of spectral and clusterkv."""
    cached: ByLayer[int]
    """Of spectral and clusterkv."""
    basis: ByLayer[str]
    """Of loki."""
    stage: ByLayer[str]
    """Of loki."""
    tokens_per_cluster: ByLayer[int]
    """Of clusterkv."""
    segment: ByLayer[int]
    """Of clusterkv."""
    iterations: ByLayer[int]
    """Of clusterkv."""
    tail: ByLayer[bool]
    """Of clusterkv."""
    page: ByLayer[int]
    """Of quest."""
    window: ByLayer[int]
    """Of clusterkv, snapkv and subgen."""
    kernel: ByLayer[int]
    """Of snapkv."""
    pooling: ByLayer[str]
    """Of snapkv."""
    clusters: ByLayer[int]
    """Of subgen."""
    delta: ByLayer[float | None]
    """Of subgen."""
    growth: ByLayer[float]
    """Of subgen."""
    normaliser: ByLayer[str]
    """Of subgen."""
    s: ByLayer[int]
    """Of subgen."""
    t: ByLayer[int]
    """Of subgen."""
    record_mass: ByLayer[bool]
    """Of full."""
    record_queries: ByLayer[int]
    """Of full."""
    groups: str | SharingMap | None
    """Of cla."""
    pool: str
    """Of cla."""
    uptrained: bool | None
    """Of cla."""


class Settings(DecodeSettings, total=False):
    """The same for all but `decode`: with the `seed` of the methods."""

    seed: ByLayer[int]
    """Of subgen."""
