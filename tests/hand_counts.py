"""Bytes of each method, counted by hand: of one sequence that was prefilled and then decoded token by token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from oracle_heads import amount, budget

CHUNK, SLOTS, PAGE = 256, 16, 64
"""Tokens by which buffers grow, those of stores that evict, and of a page."""


@dataclass(frozen=True)
class Shape:
    """`tokens` of which the first `prompt` came at once, with numbers of `b` bytes."""

    tokens: int
    prompt: int
    dim: int
    value_dim: int
    kv_heads: int
    group: int
    b: int
    codewords: int = 8

    @property
    def row(self) -> int:
        """Bytes of a key and a value."""
        return (self.dim + self.value_dim) * self.b

    def readers(self, select: str) -> int:
        """How many choose tokens of their own."""
        return self.kv_heads * (self.group if select == "head" else 1)


@dataclass(frozen=True)
class Bytes:
    read: int
    """By the last step, of the sequence."""
    held: int
    shared: int = 0
    """By the last step, once for all sequences."""


def grown(count: int, by: int = CHUNK) -> int:
    return math.ceil(count / by) * by


def full(of: Shape, **settings: Any) -> Bytes:
    return Bytes(of.kv_heads * of.tokens * of.row, of.kv_heads * grown(of.tokens) * of.row)


def loki(of: Shape, **settings: Any) -> Bytes:
    """The index is part of the keys with "pca", whose components turn the query and the new key, read once for both."""
    rank, k = amount(settings.get("rank", 0.25), of.dim), budget(settings, of.tokens)
    chosen = of.readers(settings.get("select", "group")) * k * of.row
    pca = settings.get("basis", "score") == "pca"
    maps = of.kv_heads * of.dim * of.b * (of.dim if pca else 2 * rank)
    row = of.row + (0 if pca else rank * of.b)
    return Bytes(of.kv_heads * of.tokens * rank * of.b + chosen, of.kv_heads * grown(of.tokens) * row, maps)


def exact_topk(of: Shape, **settings: Any) -> Bytes:
    """Every key, then values only."""
    chosen = of.readers(settings.get("select", "group")) * budget(settings, of.tokens) * of.value_dim * of.b
    return Bytes(of.kv_heads * of.tokens * of.dim * of.b + chosen, of.kv_heads * grown(of.tokens) * of.row)


def quest(of: Shape, **settings: Any) -> Bytes:
    """Two corners of each page, the growing one too; pages are read whole."""
    page, growth = settings.get("page", 16), CHUNK // settings.get("page", 16)
    pages, chosen = math.ceil(of.tokens / page), math.ceil(budget(settings, of.tokens) / page) * page
    corners = 2 * of.kv_heads * of.dim * of.b
    read = pages * corners + of.readers(settings.get("select", "group")) * chosen * of.row
    return Bytes(read, of.kv_heads * grown(of.tokens) * of.row + grown(pages, growth) * corners)


def sparq(of: Shape, **settings: Any) -> Bytes:
    """Some channels of every key; the sum of values is float32."""
    rank, k = amount(settings.get("rank", 0.25), of.dim), budget(settings, of.tokens)
    readers, mean = of.readers(settings.get("select", "group")), of.kv_heads * of.value_dim * 4
    return Bytes(readers * (of.tokens * rank * of.b + k * of.row) + mean, full(of).held + mean)


def clusterkv(of: Shape, **settings: Any) -> Bytes:
    """All centroids and sizes, then k tokens and where they lie; for the tail the mean values, too."""
    size, sinks = settings.get("tokens_per_cluster", 16), settings.get("sinks", 16)
    k = budget({"keep": 1024, **settings}, of.tokens)
    upto, clusters = min(sinks, of.prompt), 0
    for length in range(of.prompt, of.tokens):  # before each decoded token
        window = max(1, min(settings.get("window", 320), budget({"keep": 1024, **settings}, length) // 2 - sinks))
        first = max(upto, min(sinks, length))
        if length > first and (length == of.prompt or length - first >= window):
            clusters, upto = clusters + max(1, round((length - first) / size)), length
    growth = math.ceil(CHUNK / size)
    row = grown(clusters, growth) * (of.row + 4) + (grown(upto) * 4 if clusters else 0)
    held = of.kv_heads * (grown(of.tokens) * of.row + row)
    if not clusters or k == of.tokens:
        return Bytes(of.kv_heads * of.tokens * of.row, held)
    tail = of.value_dim * of.b if settings.get("tail") else 0
    index = of.kv_heads * clusters * (of.dim * of.b + 4 + tail)
    return Bytes(index + of.readers(settings.get("select", "group")) * k * (of.row + 4), held)


def spectral(of: Shape, **settings: Any) -> Bytes:
    """Of each token codeword, code and scale, of each full page a correction in 8 bits; codewords, their lengths and
    maps in 16 bits, once."""
    rank, k = amount(settings.get("rank", 0.5), of.dim), budget({"keep": 0.0625, **settings}, of.tokens)
    code = 1 + rank * settings.get("bits", 2) // 8 + 2
    rows = settings.get("rows", 16)
    row = of.row if rows == 16 else of.dim + of.value_dim + 4
    correction = (of.value_dim + 2) * (settings.get("residual", True) and rows != "xcla")
    read = of.tokens * code + of.tokens // PAGE * correction
    if rows == "xcla":
        read += min(of.tokens, settings.get("recent", 16)) * of.row
    chosen = of.readers(settings.get("select", "group")) * k * row
    tables = of.codewords * (of.dim + of.value_dim + 1) + 2 * of.dim * rank + (_maps_back(of) if rows == "xcla" else 0)
    held = of.kv_heads * (grown(of.tokens) * (row + code) + grown(of.tokens) // PAGE * correction)
    held += _recent(of, settings.get("recent", 16)) if rows == "xcla" else 0
    return Bytes(of.kv_heads * read + chosen, held, of.kv_heads * 2 * tables)


def xcla(of: Shape, **settings: Any) -> Bytes:
    """A layer by itself in 8 bits, with a scale for keys and one for values; the last rows, with an int64 position for
    all heads; maps back in 16 bits, once."""
    token, recent = of.dim + of.value_dim + 4, settings.get("recent", 16)
    read = of.tokens * token + min(of.tokens, recent) * of.row
    held = of.kv_heads * grown(of.tokens) * token + _recent(of, recent)
    return Bytes(of.kv_heads * read, held, of.kv_heads * 2 * _maps_back(of))


def _recent(of: Shape, count: int) -> int:
    """Rows as they came, 16 more than are read, with an int64 position for all heads."""
    return (count + 16) * (of.kv_heads * of.row + 8)


def _maps_back(of: Shape) -> int:
    return sum(dim * dim + dim for dim in (of.dim, of.value_dim))


def _slots(of: Shape, count: int, beside: int) -> int:
    return of.kv_heads * grown(count, SLOTS) * (of.row + beside)


def streaming(of: Shape, **settings: Any) -> Bytes:
    """What is held, with an int32 position each."""
    k = budget(settings, of.tokens)
    return Bytes(of.kv_heads * k * (of.row + 4), _slots(of, k, 4))


def h2o(of: Shape, **settings: Any) -> Bytes:
    """And a float32 of attention received."""
    k = budget(settings, of.tokens)
    return Bytes(of.kv_heads * k * (of.row + 8), _slots(of, k, 8))


def snapkv(of: Shape, **settings: Any) -> Bytes:
    """Of the prompt what the budget allows, and all decoded tokens, with an int32 position that no step reads."""
    count = budget(settings, of.prompt) + of.tokens - of.prompt
    return Bytes(of.kv_heads * count * of.row, _slots(of, count, 4))


def subgen(of: Shape, **settings: Any) -> Bytes | None:
    """Exact tokens with an int32 position each, sampled ones, and Σ‖v‖² of 8 bytes. Clusters follow from the keys: of
    these see test_subgen_sketch."""
    if settings.get("normaliser", "values") == "clusters":
        return None
    exact, left = settings.get("sinks", 4) + settings.get("window", 128), 0
    if of.tokens > exact:
        left = of.kv_heads * (settings.get("s", 256) * of.row + 8)
    exact = min(of.tokens, exact)
    return Bytes(of.kv_heads * exact * (of.row + 4) + left, _slots(of, exact, 4) + left)
