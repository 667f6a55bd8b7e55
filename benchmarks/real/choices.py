"""What every default is chosen from: the same bytes, spent in different ways, and what the attention then loses.

A row of 16 bits as in `settings`: rank r costs r / 2·D of the bytes, the rest are rows read exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .settings import ONLY_CHOSEN, spectral_of

Setting = dict[str, Any]
LEVEL = 1 / 8
"""Of the bytes, where nothing else is said."""
HEAD_DIM, GROUP, LENGTH = 64, 3, 2048
"""SmolLM2's, and its query heads for each KV head: so many times the rows are read where each chooses for itself; and
the tokens that are decoded after."""


def _loki(rank: int, level: float = LEVEL, **other: Any) -> Setting:
    setting = {"method": "loki", "rank": rank, "keep": _rows(rank, level), "basis": "score", "select": "group"}
    return {**setting, **ONLY_CHOSEN, **other}


def _sparq(rank: int, **other: Any) -> Setting:
    return {"method": "sparq", "rank": rank, "keep": _rows(rank, LEVEL), "select": "group", **other}


def _sparq_by_head(rank: int) -> Setting:
    """Every head scores channels of its own, too."""
    keep = round(LEVEL / GROUP - rank / (2 * HEAD_DIM), 5)
    return {"method": "sparq", "rank": rank, "keep": keep, "select": "head"}


def _rows(rank: int, level: float) -> float:
    return round(level - rank / (2 * HEAD_DIM), 5)


def _quest(page: int, **other: Any) -> Setting:
    keep = round(LEVEL - 1 / page, 5)
    return {"method": "quest", "page": page, "keep": keep, "select": "group", "sinks": 0, **other}


def _clusterkv(size: int, keep: float | None = None, **other: Any) -> Setting:
    rows = round(LEVEL - 0.5 / size, 5) if keep is None else keep
    return {"method": "clusterkv", "tokens_per_cluster": size, "keep": rows, "window": 64, "sinks": 4, **other}


def _streaming(sinks: int) -> Setting:
    return {"method": "streaming", "keep": LEVEL, "sinks": sinks}


def _subgen(window: int, clusters: int, values: int, normaliser: str = "clusters") -> Setting:
    sizes = {"window": window, "clusters": clusters, "t": 2, "s": values}
    return {"method": "subgen", **sizes, "normaliser": normaliser}


def _spectral(rank: int, bits: int, level: float = LEVEL, **other: Any) -> Setting:
    (setting,) = spectral_of(rank, bits, level, HEAD_DIM, LENGTH)
    return {**setting, **other}


def _whole_rows(setting: Setting) -> Setting:
    """The same bytes in rows of 16 bits."""
    share = (2 * HEAD_DIM + 4) / (4 * HEAD_DIM)
    return {**setting, "rows": 16, "keep": round(setting["keep"] * share, 5)}


CHOICES: Mapping[str, list[Setting]] = {
    "Loki, the basis": [
        _loki(8),
        _loki(8, basis="pca"),
        _loki(16, 1 / 4),
        _loki(16, 1 / 4, basis="pca"),
        _loki(24, 1 / 4, basis="pca"),
    ],
    "Loki, the rank": [_loki(rank) for rank in (1, 2, 4, 8, 12)],
    "Loki, the rank at a quarter of the bytes": [_loki(rank, 1 / 4) for rank in (4, 8, 16, 24)],
    "Loki, who chooses": [
        _loki(8),
        _loki(8, select="max"),
        {**_loki(8), "select": "head", "keep": round(_rows(8, LEVEL) / GROUP, 5)},
    ],
    "Loki, sinks and recent tokens": [
        _loki(8, basis=basis, sinks=sinks, recent=recent)
        for basis in ("score", "pca")
        for sinks, recent in ((0, 0), (1, 16), (4, 16), (4, 64))
    ],
    "SparQ, the rank": [_sparq(rank) for rank in (2, 4, 8, 12)],
    "SparQ, who chooses": [_sparq(8), _sparq_by_head(2)],
    "Quest, who chooses": [_quest(16), {**_quest(16), "select": "head", "keep": round((LEVEL - 1 / 16) / GROUP, 5)}],
    "exact scores, who chooses": [
        {"method": "exact_topk", "select": select, "keep": round(LEVEL / heads, 5)}
        for select, heads in (("group", 1), ("head", GROUP))
    ],
    "Quest, the page": [_quest(page) for page in (16, 32, 64)],
    "Quest, sinks and recent tokens": [
        _quest(16, sinks=sinks, recent=recent) for sinks, recent in ((0, 0), (1, 0), (1, 64))
    ],
    "ClusterKV, tokens per cluster": [_clusterkv(size) for size in (8, 16, 32, 80)],
    "ClusterKV, window and sinks": [
        _clusterkv(16, window=16),
        _clusterkv(16),
        _clusterkv(16, sinks=1),
        _clusterkv(16, sinks=16),
    ],
    "ClusterKV, passes of k-means": [
        *(_clusterkv(16, iterations=passes) for passes in (1, 3, 5, 20)),
        *(_clusterkv(80, iterations=passes) for passes in (1, 3, 5, 20)),
    ],
    "ClusterKV, a tail": [_clusterkv(32, LEVEL - 1 / 32, tail=True), _clusterkv(16, LEVEL - 1 / 16, tail=True)],
    "StreamingLLM, sinks": [_streaming(sinks) for sinks in (0, 1, 4, 16, 64)],
    "SubGen, its parts": [
        _subgen(128, 16, 64),
        _subgen(32, 16, 160),
        _subgen(192, 8, 32),
        _subgen(128, 16, 64, normaliser="values"),
    ],
    "spectral, codes": [_spectral(rank, bits) for rank, bits in ((16, 2), (16, 4), (32, 2), (48, 2), (32, 4), (64, 2))],
    "spectral, codes at a sixteenth of the bytes": [
        _spectral(rank, bits, 1 / 16) for rank, bits in ((16, 2), (16, 4), (32, 2))
    ],
    "spectral, bits of rows": [
        *(_spectral(32, 2, level) for level in (1 / 8, 1 / 4)),
        *(_whole_rows(_spectral(32, 2, level)) for level in (1 / 8, 1 / 4)),
    ],
    "spectral, who chooses": [
        _spectral(32, 2),
        _spectral(32, 2, select="max"),
        {**_spectral(32, 2, select="head"), "keep": round(_spectral(32, 2)["keep"] / GROUP, 5)},
    ],
    "spectral, sinks and recent tokens": [
        _spectral(32, 2, sinks=sinks, recent=recent) for sinks, recent in ((0, 16), (1, 16), (4, 16), (1, 4), (1, 64))
    ],
    "spectral, what is not read": [_spectral(32, 2), _spectral(32, 2, residual=False)],
}
"""By what is chosen."""
