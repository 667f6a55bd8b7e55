"""Operands of a scan, drawn at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcal.kernels.codes import encode, rotation
from kvcal.kernels.pages import PageLayout, Part
from kvcal.kernels.scan import Budget, Tables, Tokens

PAGE = 64


@dataclass(frozen=True)
class Problem:
    query: Tensor
    tokens: Tokens
    tables: Tables
    budget: Budget

    @property
    def operands(self) -> tuple[Any, ...]:
        return self.query, self.tokens, self.tables, self.budget


def by_head(tensor: Tensor) -> Tensor:
    """The same numbers with heads first in memory."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def budget(lengths: list[int], keep: float, sample: int | None = None, sinks: int = 1, recent: int = 8) -> Budget:
    """
    Args:
        sample: tokens of it, at least; None: every token.
    """
    held = torch.tensor(lengths)
    first = held.clamp_max(sinks)
    begin = torch.maximum(first, held - recent)
    room = (held * keep).long().clamp_min(1)
    stride = torch.ones_like(held) if sample is None else (held // sample).clamp_min(1)
    rank = (room // stride).clamp_min(1).masked_fill(room >= begin - first, -1)
    return Budget(held, first, begin, stride, rank, max(lengths), int((-(-held // stride)).max()))


def drawn(
    lengths: list[int], *, heads: int = 2, group: int = 2, head_dim: int = 16, value_dim: int | None = None,
    rank: int = 16, bits: int | None = 4, codewords: int = 6, rows: int = 16, dtype: torch.dtype = torch.float32,
    keep: float = 0.1, sample: int | None = None, capacity: int | None = None, seed: int = 0, rounded: bool = True,
) -> Problem:  # fmt: skip
    """
    Args:
        rounded: whether codewords are numbers of bfloat16, as calibrated ones.
    """
    random = torch.Generator().manual_seed(seed)
    batch, value_dim = len(lengths), head_dim if value_dim is None else value_dim
    capacity = capacity or -(-max(lengths) // 256) * 256

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    query = normal(batch, heads, group, head_dim).to(dtype)
    word_key, word_value = normal(heads, codewords, head_dim), normal(heads, codewords, value_dim)
    if rounded:
        word_key, word_value = word_key.bfloat16().float(), word_value.bfloat16().float()
    word = torch.randint(codewords, (batch, heads, capacity, 1), generator=random, dtype=torch.uint8)
    of_head = torch.arange(heads).unsqueeze(1)
    key_rest, value_rest = normal(batch, heads, capacity, head_dim), normal(batch, heads, capacity, value_dim) / 2
    key = word_key[of_head, word.squeeze(-1).long()] + key_rest
    value = word_value[of_head, word.squeeze(-1).long()] + value_rest
    query_map = torch.linalg.qr(normal(heads, head_dim, head_dim)).Q[:, :, :rank].contiguous()
    pages = torch.nn.functional.pad(value_rest, (0, 0, 0, -capacity % PAGE)).unflatten(2, (-1, PAGE)).mean(3)
    correction, correction_scale = encode(pages, 8)
    held: dict[str, Tensor | None]
    if bits is None:
        reduced = (key @ query_map).to(dtype)
        held = {"key": key.to(dtype), "value": value.to(dtype), "reduced": reduced}
        return Problem(query, tokens(held), Tables(query_map), budget(lengths, keep, sample))
    reduced, scale = encode(key_rest @ query_map, bits)
    held = {"reduced": reduced, "scale": scale.unsqueeze(-1), "codeword": word}
    held |= {"correction": correction, "correction_scale": correction_scale.unsqueeze(-1)}
    tables = Tables(query_map, word_key, word_value)
    if rows == 16:
        held |= {"key": key.to(dtype), "value": value.to(dtype)}
    else:
        tables = Tables(query_map, word_key, word_value, rotation(head_dim).float(), rotation(value_dim).float())
        for name, rest, turn in (("key", key_rest, tables.turn_key), ("value", value_rest, tables.turn_value)):
            held[name], token_scale = encode(rest @ turn.mT, 8)
            held[f"{name}_scale"] = token_scale.unsqueeze(-1)
    return Problem(query, tokens(held), tables, budget(lengths, keep, sample))


def in_pages(made: Tokens, spare: int = 3) -> tuple[Tokens, Tensor]:
    """(the same tokens in pages of an engine, in any order and among others; their block table [B, P] int32)"""
    batch, heads, capacity, _ = made.key.shape
    count = capacity // PAGE
    table = torch.randperm(batch * count + spare, generator=torch.Generator().manual_seed(2))[: batch * count]
    of_pages = made.of_pages()
    held = {**made.of_tokens(), **of_pages}
    layout = PageLayout({name: Part(part.shape[3], part.dtype, name in of_pages) for name, part in held.items()})
    pieces = torch.full((batch * count + spare, heads, layout.nbytes), 255, dtype=torch.uint8)  # floats: not a number
    parts = layout.parts_of(pieces)
    for name, part in held.items():
        parts[name][table] = part.unflatten(2, (count, -1)).transpose(1, 2).flatten(0, 1)
    return Tokens(**parts), table.view(batch, count).to(torch.int32)


def tokens(held: dict[str, Tensor | None]) -> Tokens:
    return Tokens(**{name: None if part is None else by_head(part) for name, part in held.items()})
