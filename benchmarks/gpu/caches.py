"""Made caches: random keys and values in the buffers of stores, since a prefill of 131072 tokens takes minutes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from sizes import Sizes
from torch import Tensor

from kvcal.runtime.kv.buffers import TokenBuffer
from kvcal.runtime.stores.paged import PagedStore

CHOOSING = (
    *(f"kernels.{name}" for name in ("append", "attend", "cluster", "dense", "score", "select")),
    "runtime.kv.pages", "runtime.methods.full",
)  # fmt: skip
"""Modules that choose a backend: of every kernel, and where a step takes another way where kernels run."""
COLD = 4
"""Times the L2 cache that has to be read before something is read again."""
MOST_COPIES = 24


@dataclass(frozen=True)
class Copy:
    """What one layer holds and is asked: one of several, so that L2 holds none of it when its turn comes."""

    query: Tensor
    """[B, Hkv·G, 1, D]"""
    key_new: Tensor
    """[B, Hkv, 1, D]"""
    value_new: Tensor
    key: Tensor
    """[B, Hkv, S, D], the last slot still to be written."""
    value: Tensor
    basis: Tensor
    """[Hkv, D, D] orthonormal rows; the first ones hold most of the keys, unless these lie in it already."""

    @property
    def grouped(self) -> Tensor:
        """[B, Hkv, G, D]"""
        return self.query.squeeze(2).unflatten(1, (self.key.shape[1], -1))

    @property
    def new(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key_new, self.value_new

    def float(self) -> Copy:
        """The same numbers, in float32, at other addresses."""
        return replace(self, **{name: tensor.float() for name, tensor in vars(self).items()})


def draw(sizes: Sizes, batch: int, length: int, device: torch.device, seed: int = 0, rotated: bool = False) -> Copy:
    """Args: rotated: keys lie in the basis, as Loki stores them when it is one of principal components."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=sizes.dtype)

    square = torch.randn(sizes.heads, sizes.dims, sizes.dims, generator=generator, device=device)
    basis = torch.linalg.qr(square)[0].to(sizes.dtype)
    spread = torch.full((sizes.dims,), 0.3, device=device, dtype=sizes.dtype)
    spread[: sizes.rank] = 1.5
    key = normal(batch, sizes.heads, length, sizes.dims).mul_(spread)
    new = normal(batch, sizes.heads, 1, sizes.dims).mul_(spread) @ basis
    query = normal(batch, sizes.heads, sizes.group, sizes.dims) @ basis
    return Copy(
        query.flatten(1, 2).unsqueeze(2),
        new,
        normal(batch, sizes.heads, 1, sizes.dims),
        key if rotated else key @ basis,
        normal(batch, sizes.heads, length, sizes.dims),
        basis,
    )


def copies(sizes: Sizes, batch: int, length: int, device: torch.device) -> list[Copy]:
    """So many that a step which reads only `keep` tokens of each still finds nothing in L2, if memory allows."""
    token = batch * sizes.heads * 2 * sizes.dims * sizes.dtype.itemsize
    wanted, fitting = 2, 2
    if device.type == "cuda":
        wanted = math.ceil(COLD * l2_bytes(device) / (token * min(sizes.keep, length)))
        # As much again for the pages of a store or of a baseline, with what an index takes.
        fitting = int(torch.cuda.mem_get_info(device)[0] * 0.4 / (token * length))
    number = max(1, min(wanted, fitting, MOST_COPIES))
    return [draw(sizes, batch, length, device, seed) for seed in range(number)]


def l2_bytes(device: torch.device) -> int:
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20


def fill(store: Any, length: int, tensors: Mapping[str, Tensor], chunk: int = 256) -> None:
    """Make a store hold the first `length` tokens of its tensors [B, Hkv, capacity, …], without copying them."""
    batch = tensors["key"].shape[0]
    for name, tensor in tensors.items():
        rows = TokenBuffer(chunk)
        rows.tensor, rows.used = tensor, length
        store.rows[name] = rows
    store.lengths, store.seen = [length] * batch, length


def fill_pages(store: PagedStore, key: Tensor, value: Tensor, chunk: int = 8192) -> None:
    """Make a store that has a layout of its own hold all of these tokens. Args: chunk: tokens encoded at a time."""
    for some in zip(key.split(chunk, 2), value.split(chunk, 2), strict=True):
        store.append(*some)


def fill_clusters(store: Any, sizes: Sizes, length: int, per_cluster: int, seed: int = 0) -> None:
    """Clusters over all tokens of a filled store but the sinks and half a window, of unequal sizes.

    Their tokens are adjacent, as the store sorts them; that their means are random matters to no time.
    """
    key = store.rows["key"].tensor
    batch, heads, _, dims = key.shape
    upto = length - sizes.window // 2
    clustered = upto - sizes.sinks
    count = max(1, round(clustered / per_cluster))
    room = -(-(count + 8) // 16) * 16
    generator = torch.Generator(key.device).manual_seed(seed)
    member_of = torch.randint(count, (batch * heads, clustered), generator=generator, device=key.device)
    size = torch.zeros(batch * heads, room, dtype=torch.int32, device=key.device)
    size.scatter_add_(1, member_of, torch.ones_like(member_of, dtype=torch.int32))
    shape = batch, heads, room, dims
    means = {
        name: torch.randn(shape, generator=generator, device=key.device).to(sizes.dtype).to(key.dtype)
        for name in ("cluster.key", "cluster.value")
    }
    position = torch.arange(key.shape[2], dtype=torch.int32, device=key.device).view(1, 1, -1, 1)
    tensors = {
        **means,
        "cluster.size": size.view(batch, heads, room, 1),
        "position": position.expand(batch, heads, -1, -1).contiguous(),
    }
    for name, tensor in tensors.items():
        rows = TokenBuffer(4)
        rows.tensor, rows.used = tensor, length if name == "position" else count
        store.rows[name] = rows
    closed = torch.tensor([[row, upto, count] for row in range(batch)])
    store.clusters.restore(
        {"lengths": closed[:, 0], "clusters.closed": closed, "clusters.prompts": closed.new_zeros(0, 3)}
    )


@contextmanager
def forced(backend: str) -> Iterator[None]:
    """Every kernel runs on one backend, also where steps leave the choice to it."""
    with ExitStack() as stack:
        for name in CHOOSING:
            stack.enter_context(mock.patch.object(import_module(f"kvcal.{name}"), "choose", lambda *_: backend))
        yield
