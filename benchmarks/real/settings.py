"""What is measured: each method at equal bytes, and with its paper's own settings.

A token of a KV head is 2·D numbers of 16 bits: `bytes` below is a fraction of reading all of them. What a method reads
beside exact rows (scores' dimensions, boxes, centroids, codes) takes half of the bytes at most; rows take the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Setting = dict[str, Any]
LEVELS = {"1/32": 1 / 32, "1/16": 1 / 16, "1/12": 1 / 12, "1/8": 1 / 8, "1/4": 1 / 4, "1/2": 1 / 2}
GROUP: Setting = {"select": "group"}
"""One choice for all query heads of a KV head: where each chooses for itself, G times the rows are read."""
ONLY_CHOSEN: Setting = {"sinks": 0, "recent": 0}
"""Loki as published: no token is read whatever its score."""
_SUBGEN: Setting = {"method": "subgen", "normaliser": "clusters"}
"""As published."""
OF_A_PREFILL = ("h2o", "snapkv")
"""Methods that start from the queries of a prompt, which only a prefill of the whole model has. They hold what they
read."""
LARGE_RANK = 0.25
"""Of the head dim: beyond it, rows choose better than dimensions of as many bytes."""

CODEWORDS, PAGE, BATCH = 64, 64, 8
"""Of a codebook of `calibrate pca`; tokens of a page; sequences that share what a step reads once."""


def _power_of_two(number: float) -> int:
    return 1 << max(0, int(number).bit_length() - 1)


def _share(keep: float) -> float:
    return round(keep, 5)


def at_equal_bytes(level: float, head_dim: int, length: int) -> list[Setting]:
    """The settings of every method that reads `level` of the bytes, rows shared by the group."""
    dims = _power_of_two(min(level * head_dim, LARGE_RANK * head_dim))
    rows = level - dims / (2 * head_dim)
    page = max(16, _power_of_two(2 / level))
    small = max(16, _power_of_two(1 / level))
    held = round(level * length)
    return [
        {"method": "loki", "rank": dims, "keep": _share(rows), "basis": "pca", **GROUP, **ONLY_CHOSEN},
        {"method": "loki", "rank": dims, "keep": _share(rows), "basis": "score", **GROUP, "sinks": 1, "recent": 16},
        {"method": "sparq", "rank": dims, "keep": _share(rows), **GROUP},
        {"method": "quest", "page": page, "keep": _share(level - 1 / page), **GROUP, "sinks": 1},
        *(
            {
                "method": "clusterkv",
                "tokens_per_cluster": size,
                "keep": _share(level - 0.5 / size),
                "window": 64,
                "sinks": 4,
            }
            for size in (80, small)
        ),
        {"method": "streaming", "keep": _share(level)},
        {"method": "h2o", "keep": _share(level)},
        {"method": "snapkv", "keep": _share(level)},
        {**_SUBGEN, "window": held // 2, "clusters": held // 16, "t": 2, "s": held // 4},
        {"method": "subgen", "window": held // 2, "s": held // 2, "normaliser": "values"},
        # What sinks and recent tokens are worth.
        {"method": "loki", "rank": dims, "keep": _share(rows), "basis": "score", **GROUP, **ONLY_CHOSEN},
        {"method": "quest", "page": page, "keep": _share(level - 1 / page), **GROUP, "sinks": 0},
        *_spectral(level, head_dim, length),
    ]


def _spectral(level: float, head_dim: int, length: int) -> list[Setting]:
    """The finest codes that take two fifths of the bytes at most; where none do, half of the dimensions in 2 bits."""
    for rank, bits in ((head_dim, 4), (head_dim, 2)):
        if _index(rank, bits, head_dim, length) <= 0.4 * level:
            return spectral_of(rank, bits, level, head_dim, length)
    return spectral_of(head_dim // 2, 2, level, head_dim, length)


def spectral_of(
    rank: int, bits: int, level: float, head_dim: int, length: int, codewords: int = CODEWORDS
) -> list[Setting]:
    """Rows of 8 bits with what codes leave of the bytes; none where they leave nothing."""
    keep = (level - _index(rank, bits, head_dim, length, codewords)) * 4 * head_dim / (2 * head_dim + 4)
    setting = {"method": "spectral", "rank": rank, "bits": bits, "rows": 8, "keep": _share(keep)}
    return [setting] if keep > 0 else []


def _index(rank: int, bits: int, head_dim: int, length: int, codewords: int = CODEWORDS) -> float:
    return index_of([(rank, bits)], head_dim, length, codewords)


def index_of(
    codes: Sequence[tuple[int, int]], head_dim: int, length: int, codewords: int = CODEWORDS, pages: bool = True
) -> float:
    """Of the bytes: codeword, codes and scales of every token, corrections of pages, and the tables of the codebook.

    Args:
        codes: groups of dimensions with a scale of their own: how many, and bits of each.
    """
    token = 1 + sum(dims * bits / 8 + 2 for dims, bits in codes) + pages * (head_dim + 2) / PAGE
    tables = 2 * (2 * codewords * head_dim + codewords + 2 * head_dim * sum(dims for dims, _ in codes))
    return (token + tables / BATCH / length) / (4 * head_dim)


PUBLISHED: Setting = {
    "method": "loki", "rank": 0.25, "keep": 0.25, "basis": "pca", "select": "head", **ONLY_CHOSEN
}  # fmt: skip
PAPERS: list[Setting] = [
    PUBLISHED,
    {"method": "exact_topk", "keep": 0.25, "select": "head"},
    {"method": "h2o", "keep": 0.25},
    {"method": "snapkv", "keep": 1024, "window": 32, "kernel": 5, "pooling": "avg"},
    {"method": "streaming", "keep": 0.25},
    {"method": "quest", "page": 16, "keep": 0.25, "select": "head", "sinks": 0},
    {"method": "sparq", "rank": 0.25, "keep": 0.25, "select": "head"},
    {"method": "clusterkv", "keep": 1024, "tokens_per_cluster": 80, "window": 320, "sinks": 16},
    {**_SUBGEN, "window": 128, "clusters": 64, "t": 4, "s": 256},
    {"method": "spectral", "rank": 0.5, "bits": 2, "keep": 0.0625},
]
"""As published, and spectral: each query head chooses for itself where the paper's do."""

WHY_LOKI: dict[str, Setting] = {
    "as published": PUBLISHED,
    "chosen by the group": {**PUBLISHED, "select": "group"},
    "the score basis": {**PUBLISHED, "basis": "score"},
    "half of the rank": {**PUBLISHED, "rank": 0.5},
    "three quarters of the rank": {**PUBLISHED, "rank": 0.75},
    "exact scores": {"method": "exact_topk", "keep": 0.25, "select": "head"},
    "first layer dense": {**PUBLISHED, "dense_layers": 1},
    "first two layers dense": {**PUBLISHED, "dense_layers": 2},
    "sinks and recent tokens": {**PUBLISHED, "sinks": 4, "recent": 64},
    "pre-rotary basis": {**PUBLISHED, "stage": "pre"},
    "half of the tokens": {**PUBLISHED, "keep": 0.5},
}


BY_ANSWERS: list[Setting] = [
    *(
        {"method": "loki", "rank": rank, "keep": 0.25, "basis": "score", **GROUP, **ONLY_CHOSEN}
        for rank in (0.125, 0.25, 0.5)
    ),
    *({"method": "sparq", "rank": rank, "keep": 0.25, **GROUP} for rank in (0.125, 0.25)),
    *(
        {"method": "clusterkv", "tokens_per_cluster": 32, "keep": _share(level - 1 / 64), "window": 64, "sinks": 4}
        for level in (1 / 8, 1 / 4)
    ),
    *(
        setting
        for level in (1 / 16, 1 / 8)
        for rank, bits in ((16, 2), (16, 4), (32, 2))
        for setting in spectral_of(rank, bits, level, 64, 2048)
    ),
    {"method": "streaming", "keep": 0.125, "sinks": 64},
    {"method": "subgen", "window": 128, "clusters": 16, "t": 2, "s": 64, "normaliser": "values"},
]
"""Choices that are made by answers, because errors on text rank them otherwise: facts that are asked for need more
dimensions. ClusterKV, spectral (at 1/16 and 1/8), StreamingLLM and SubGen are compared with the rows at equal bytes."""

QUESTIONS: list[Setting] = [PUBLISHED, *BY_ANSWERS[:2], *_spectral(1 / 16, 64, 2048)]
"""Decoded with a calibration on questions, too."""

SEES_QUESTION: list[Setting] = [
    setting
    for level in ("1/16", "1/8", "1/4")
    for setting in (
        {"method": "snapkv", "keep": LEVELS[level]},
        {"method": "snapkv", "keep": LEVELS[level], "kernel": 11},
        {"method": "h2o", "keep": LEVELS[level]},
        *_spectral(LEVELS[level], 64, 2048),
    )
]
"""Asked with the question in the prompt, by whose last queries SnapKV chooses; of an answer of five digits these attend
to the first, and pooling over `kernel` neighbours keeps those behind it."""

AIMS: dict[int, tuple[str, ...]] = {4096: ("1/16", "1/12"), 7680: ("1/16",)}
"""By tokens of the context: the levels of bytes at which `spectral` is asked more questions, or of more tasks."""


def aims(length: int, head_dim: int) -> list[Setting]:
    return [
        setting for level in AIMS[length] for setting in spectral_of(head_dim // 2, 2, LEVELS[level], head_dim, length)
    ]
