"""Random rows of attention, alone and as padded batches, and how a store is driven through them."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import coded
import torch
from torch import Tensor

from kvcal.runtime.attention import SoftmaxSpec
from kvcal.runtime.methods import METHODS
from kvcal.runtime.methods.base import Policy
from kvcal.runtime.methods.basis import Basis
from kvcal.runtime.methods.loki import Loki, LokiPolicy
from kvcal.runtime.settings import new_store
from kvcal.runtime.store import Store

TOLERANCES: dict[torch.dtype, dict[str, float]] = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    # Logits are float32 whatever the cache's dtype.
    torch.float64: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
}


@dataclass(frozen=True)
class Geometry:
    dim: int
    value_dim: int
    kv_heads: int
    group: int

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def scaling(self) -> float:
        return self.dim**-0.5


@dataclass(frozen=True)
class Row:
    """One row without padding: `prompt` tokens that are prefilled, and those decoded after them."""

    query: Tensor
    """[Hq, S, D]"""
    key: Tensor
    """[Hkv, S, D]"""
    value: Tensor
    """[Hkv, S, Dv]"""
    prompt: int

    def double(self) -> Row:
        return Row(self.query.double(), self.key.double(), self.value.double(), self.prompt)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value


@dataclass(frozen=True)
class Step:
    """What one decoded token of a row got."""

    output: Tensor
    """[Hq, Dv]"""
    read: Tensor
    """[Hq, n] bool, n = tokens of the row so far."""


def draw(
    geometry: Geometry, prompts: Sequence[int], steps: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[Row]:
    """A row per prompt, each with `steps` decoded tokens. Queries are long enough that attention is uneven."""
    generator = torch.Generator().manual_seed(seed)

    def normal(heads: int, tokens: int, dim: int) -> Tensor:
        return torch.randn(heads, tokens, dim, generator=generator, dtype=torch.float64).to(dtype)

    rows = []
    for prompt in prompts:
        tokens = prompt + steps
        query = normal(geometry.heads, tokens, geometry.dim) * 1.5
        key = normal(geometry.kv_heads, tokens, geometry.dim)
        # A mean unlike zero, as values of a model have it.
        value = normal(geometry.kv_heads, tokens, geometry.value_dim) + normal(geometry.kv_heads, 1, geometry.value_dim)
        rows.append(Row(query, key, value, prompt))
    return rows


def padded(rows: Sequence[Row]) -> tuple[list[Tensor], Tensor | None]:
    """([query, key, value] of the prompts [B, H, T, D] with NaN where left padding is, valid [B, T])."""
    width = max(row.prompt for row in rows)
    valid = torch.zeros(len(rows), width, dtype=torch.bool)
    tensors = [
        torch.full((len(rows), of.shape[0], width, of.shape[2]), torch.nan, dtype=of.dtype) for of in rows[0].tensors()
    ]
    for index, row in enumerate(rows):
        valid[index, width - row.prompt :] = True
        for batch, own in zip(tensors, row.tensors(), strict=True):
            batch[index, :, width - row.prompt :] = own[:, : row.prompt]
    return tensors, None if bool(valid.all()) else valid


def prefill(store: Store, rows: Sequence[Row], spec: SoftmaxSpec, chunks: Sequence[int] = ()) -> list[Tensor]:
    """Each row's outputs [Hq, prompt, Dv]; `chunks` are positions at which the batch is cut."""
    (query, key, value), valid = padded(rows)
    width = query.shape[2]
    cuts = [0, *chunks, width]
    parts = [
        store.prefill(
            query[:, :, start:stop],
            key[:, :, start:stop],
            value[:, :, start:stop],
            spec,
            None if valid is None else valid[:, start:stop],
        )
        for start, stop in itertools.pairwise(cuts)
    ]
    output = torch.cat(parts, 2)
    return [output[index, :, width - row.prompt :] for index, row in enumerate(rows)]


def append(store: Store, rows: Sequence[Row], step: int, revocable: bool = False) -> Tensor:
    """Take in decoded token `step` of every row; its queries [B, Hq, 1, D]."""
    query, key, value = (
        torch.stack([row.tensors()[which][:, row.prompt + step : row.prompt + step + 1] for row in rows])
        for which in range(3)
    )
    store.append(key, value, revocable=revocable)
    return query


def decode(
    store: Store, rows: Sequence[Row], spec: SoftmaxSpec, steps: range | None = None, revocable: bool = False
) -> list[list[Step]]:
    """[row][step] of the tokens after the prompts."""
    steps = range(rows[0].key.shape[1] - rows[0].prompt) if steps is None else steps
    taken: list[list[Step]] = [[] for _ in rows]
    for step in steps:
        output = store.attend(append(store, rows, step, revocable), spec)
        mask = store.read_mask()
        mask = mask.repeat_interleave(output.shape[1] // mask.shape[1], 1)
        for index, row in enumerate(rows):
            tokens = row.prompt + step + 1
            assert not mask[index, :, tokens:].any(), "tokens read that the row has not"
            taken[index].append(Step(output[index, :, 0], mask[index, :, :tokens]))
    return taken


def make(method: str, geometry: Geometry, **settings: Any) -> Store:
    """An empty store; loki on random maps that are orthonormal for "pca" and not for "score", spectral on random
    moments, xcla on random rows."""
    if method in ("spectral", "xcla"):
        return new_store(_coded(method, geometry, tuple(sorted(settings.items()))))
    if method != "loki":
        return new_store(METHODS[method](**settings).bind(0, geometry.dim, None))
    loki = Loki(**settings)
    assert not isinstance(loki.rank, str)
    rank = loki.rank if isinstance(loki.rank, int) else math.ceil(loki.rank * geometry.dim)
    basis = Basis(*maps(geometry, loki.basis, rank), rank)
    return Store(LokiPolicy(loki, basis))


@functools.cache
def _coded(method: str, geometry: Geometry, settings: tuple[tuple[str, Any], ...]) -> Policy:
    artifact = coded.artifact(geometry.dim, geometry.kv_heads, geometry.value_dim)
    return METHODS[method](**dict(settings)).bind(0, geometry.dim, artifact)


def maps(geometry: Geometry, basis: str, rank: int) -> tuple[Tensor, Tensor]:
    """Query and key map [Hkv, D, D] of "pca", [Hkv, rank, D] of "score"."""
    generator = torch.Generator().manual_seed(99)
    shape = (geometry.kv_heads, geometry.dim, geometry.dim)
    first, second = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    if basis == "pca":
        components = torch.linalg.qr(first).Q.float()
        return components, components
    return first[:, :rank].float() / geometry.dim**0.5, second[:, :rank].float() / geometry.dim**0.5


def fork(row: Row, step: int, seed: int) -> Row:
    """The same row with other tokens from decoded token `step` on."""
    other = torch.Generator().manual_seed(seed)
    query, key, value = (tensor.clone() for tensor in row.tensors())
    for tensor in (query, key, value):
        tail = tensor[:, row.prompt + step :]
        tail.copy_(torch.randn(tail.shape, generator=other, dtype=torch.float64))
    return Row(query, key, value, row.prompt)


def alone(method: str, geometry: Geometry, row: Row, spec: SoftmaxSpec, **settings: Any) -> list[Step]:
    """The steps of a row with a store to itself."""
    store = make(method, geometry, **settings)
    prefill(store, [row], spec)
    return decode(store, [row], spec)[0]


def assert_steps(got: Sequence[Step], expected: Sequence[Step], dtype: torch.dtype = torch.float32) -> None:
    assert len(got) == len(expected)
    for number, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(one.read, other.read), f"step {number} read other tokens"
        torch.testing.assert_close(one.output.double(), other.output.double(), **TOLERANCES[dtype])
