"""Made caches: random keys and values in the buffers of stores, since a prefill of 131072 tokens takes minutes."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor

from kvcal.kernels import backend as dispatcher
from kvcal.runtime.methods.clusters import Clusters
from kvcal.runtime.store import Store

from .sizes import Sizes

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
    """[Hkv, D, D] orthonormal rows; the first ones hold most of the keys."""

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


def draw(sizes: Sizes, batch: int, length: int, device: torch.device, seed: int = 0) -> Copy:
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
        key @ basis,
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


def fill_pages(store: Store, key: Tensor, value: Tensor, chunk: int = 8192) -> None:
    """Make an empty store hold all of these tokens.

    Args:
        chunk: tokens encoded at a time.
    """
    for some in zip(key.split(chunk, 2), value.split(chunk, 2), strict=True):
        store.take(*some)


def fill_clustered(store: Store, key: Tensor, value: Tensor, sizes: Sizes, seed: int = 0) -> None:
    """The same, in clusters of unequal sizes, all but the sinks and half a window.

    Clusters are random: which tokens they have matters to no time, and k-means would take most of it.
    """
    sequence_index, store.sequence_index = store.sequence_index, None
    fill_pages(store, key, value)
    store.sequence_index = sequence_index
    assert isinstance(sequence_index, Clusters)
    batch, heads, length, _ = key.shape
    upto = length - sizes.window // 2
    count = max(1, round((upto - sizes.sinks) / sequence_index.tokens_per_cluster))
    generator = torch.Generator(key.device).manual_seed(seed)
    shape, like = (batch, heads, length), {"device": key.device, "dtype": torch.int32}
    owner = torch.randint(count, shape, generator=generator, **like)
    closed = torch.tensor([[row, upto, count] for row in range(batch)])
    sequence_index.begin(batch, key.device)
    books = {"lengths": closed[:, 0], "clusters.closed": closed, "clusters.prompts": closed.new_zeros(0, 3)}
    sequence_index.restore({**books, "clusters.of": owner}, store.tokens)


@contextmanager
def forced(backend: str) -> Iterator[None]:
    """Every kernel runs on one backend, also where steps take another way where kernels run."""
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("kvcal.") and module is not dispatcher:
                for known in [known for known, of in vars(module).items() if of is dispatcher.choose]:
                    stack.enter_context(mock.patch.object(module, known, lambda *_, **__: backend))
        yield
