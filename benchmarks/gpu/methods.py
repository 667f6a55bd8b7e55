"""Attention steps of one layer: as `runtime.decode` captures them, and in parts.

Loki over 4 or 2 bits is no method of the runtime yet: its step here is made of kernels, in one function as the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from caches import Copy, fill, fill_clusters
from sizes import FORMS, Sizes
from spectral_steps import SpectralKernels
from torch import Tensor

from kvcal.kernels.append import append
from kvcal.kernels.attend import attend, attend_runs
from kvcal.kernels.dense import dense
from kvcal.kernels.score import quantize, score
from kvcal.kernels.select import select
from kvcal.runtime.attention import Logits
from kvcal.runtime.methods.full import Full
from kvcal.runtime.static import Clock, Step, make_step
from kvcal.runtime.static.clock import most
from kvcal.runtime.stores.basis import Basis
from kvcal.runtime.stores.clusterkv import ClusterKV, ClusterKVStore
from kvcal.runtime.stores.full import FullStore
from kvcal.runtime.stores.loki import Loki, LokiStore

Call = Callable[[], Any]
CLIPS = {2: 0.6}
"""Of scales, where it is not 1."""


@dataclass(frozen=True)
class Method:
    step: Callable[[], Tensor]
    """Writes the new token and attends: [B, Hq, 1, Dv]."""
    parts: dict[str, Call]
    """The launches it is made of, as expected.py names them; what else the step does is the rest."""


def dense_method(copy: Copy, sizes: Sizes) -> Method:
    clock, logits = _clock(copy), Logits(sizes.scaling)
    store = FullStore()
    fill(store, copy.key.shape[2] - 1, {"key": copy.key, "value": copy.value})
    step = _step(Full(), store, clock, copy)
    parts: dict[str, Call] = {
        "append": partial(_append, copy, clock),
        "attend": partial(dense, copy.grouped, copy.key, copy.value, clock.seen, scaling=sizes.scaling),
    }
    return Method(partial(step.step, *copy.new, logits), parts)


class LokiKernels:
    """One product that projects the queries, then a kernel each: append, score, select, attend."""

    def __init__(self, copy: Copy, sizes: Sizes, bits: int = 16, rank: int | None = None, of_keys: bool = False):
        """Args: of_keys: the index is the first dimensions of the keys, which lie in the basis."""
        self.copy, self.sizes, self.bits, self.clock = copy, sizes, bits, _clock(copy)
        rank = rank or sizes.rank
        self.clip = CLIPS.get(bits, 1.0)
        self.map = copy.basis[:, :rank].contiguous()
        index = copy.key[..., :rank] if of_keys else self._projected()
        self.codes, self.scales = quantize(index, bits, self.clip)
        self.written = None if of_keys else self.codes
        self.arrivals = torch.zeros(copy.key.shape[:2].numel(), dtype=torch.int32, device=copy.key.device)

    def _projected(self) -> Tensor:
        """[B, Hkv, S, r] of all keys; in float32 where a code's rounding would follow the dtype's."""
        if self.bits == 16:
            return self.copy.key @ self.map.mT
        of_heads = zip(self.copy.key.unbind(1), self.map.unbind(0), strict=True)
        return torch.stack([key.float() @ map.float().mT for key, map in of_heads], 1)

    def append(self) -> None:
        map = None if self.written is None else self.map
        _append(self.copy, self.clock, map, self.written, self.scales, bits=self.bits, clip=self.clip)

    def project(self) -> Tensor:
        return self.copy.grouped @ self.map.mT

    def score(self, projected: Tensor) -> Tensor:
        return score(
            projected, self.codes, self.scales, self.clock.seen,
            scaling=self.sizes.scaling, bits=self.bits, combine="max", out_dtype=torch.float16,
        )  # fmt: skip

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        return select(scores, self.sizes.keep, self.clock.seen, arrivals=self.arrivals)

    def attend(self, chosen: tuple[Tensor, Tensor]) -> Tensor:
        copy = self.copy
        return attend(copy.grouped, copy.key, copy.value, *chosen, scaling=self.sizes.scaling)

    def step(self) -> Tensor:
        self.append()
        return self.attend(self.select(self.score(self.project()))).flatten(1, 2).unsqueeze(2)

    def method(self, step: Callable[[], Tensor] | None = None) -> Method:
        """Args: step: the runtime's own, where it has one."""
        projected = self.project()
        scores = self.score(projected)
        chosen = self.select(scores)
        parts: dict[str, Call] = {
            "append": self.append,
            "project": self.project,
            "score": partial(self.score, projected),
            "select": partial(self.select, scores),
            "attend": partial(self.attend, chosen),
        }
        return Method(step or self.step, parts)


def loki(copy: Copy, sizes: Sizes, basis: str) -> Method:
    """Args: basis: "pca": the index is part of the keys; "score": a tensor of its own."""
    kernels = LokiKernels(copy, sizes, of_keys=basis == "pca")
    maps = copy.basis if basis == "pca" else kernels.map
    settings = Loki(rank=sizes.rank, keep=sizes.keep, select="max", basis=basis)
    tensors = {"key": copy.key, "value": copy.value}
    store = LokiStore(settings, Basis(maps, maps, sizes.rank))
    fill(store, copy.key.shape[2] - 1, tensors if basis == "pca" else {**tensors, "index": kernels.codes})
    step = _step(settings, store, _clock(copy), copy)
    return kernels.method(partial(step.step, *copy.new, Logits(sizes.scaling)))


def loki_codes(copy: Copy, sizes: Sizes, bits: int, rank: int) -> Method:
    return LokiKernels(copy, sizes, bits, rank).method()


def clusterkv(copy: Copy, sizes: Sizes, per_cluster: int) -> Method:
    settings = ClusterKV(
        keep=sizes.keep, select="max", tokens_per_cluster=per_cluster, window=sizes.window, sinks=sizes.sinks
    )
    clock, logits, length = _clock(copy), Logits(sizes.scaling), copy.key.shape[2]
    store = ClusterKVStore(settings, None)
    fill(store, length - 1, {"key": copy.key, "value": copy.value})
    fill_clusters(store, sizes, length - 1, per_cluster)
    step = _step(settings, store, clock, copy)
    grouped, scaling = copy.grouped, sizes.scaling
    scores = step.scores(grouped, logits)
    runs = step.choose(scores)
    longest = most(settings, length)
    parts: dict[str, Call] = {
        "append": partial(_append, copy, clock),
        "score": partial(step.scores, grouped, logits),
        "select": partial(step.choose, scores),
        "attend": partial(attend_runs, grouped, copy.key, copy.value, *runs, scaling=scaling, most=longest),
    }
    return Method(partial(step.step, *copy.new, logits), parts)


def spectral(copy: Copy, sizes: Sizes, form: str, flat: bool) -> Method:
    kernels = SpectralKernels(copy, sizes, form, flat)
    return Method(kernels.run, kernels.parts())


def methods(sizes: Sizes) -> dict[str, Callable[[Copy], Method]]:
    found: dict[str, Callable[[Copy], Method]] = {
        "dense": partial(dense_method, sizes=sizes),
        "loki": partial(loki, sizes=sizes, basis="pca"),
        "loki, own index": partial(loki, sizes=sizes, basis="score"),
        "loki, int4": partial(loki_codes, sizes=sizes, bits=4, rank=sizes.rank),
        "loki, int2": partial(loki_codes, sizes=sizes, bits=2, rank=2 * sizes.rank),  # of as many bytes
    }
    for per_cluster in sizes.per_cluster:
        found[f"clusterkv {per_cluster}"] = partial(clusterkv, sizes=sizes, per_cluster=per_cluster)
    for form in FORMS:
        for name, flat in ((f"spectral, {form}", False), (f"spectral, {form}, flat", True)):
            found[name] = partial(spectral, sizes=sizes, form=form, flat=flat)
    return found


def _clock(copy: Copy) -> Clock:
    batch, _, capacity, _ = copy.key.shape
    return Clock([capacity - 1] * batch, copy.key.device)


def _step(method: Any, store: Any, clock: Clock, copy: Copy) -> Any:
    step: Step = make_step(method, store, clock)
    step.reserve(copy.key.shape[2])
    return step


def _append(
    copy: Copy,
    clock: Clock,
    map: Tensor | None = None,
    codes: Tensor | None = None,
    scales: Tensor | None = None,
    **of_codes: Any,
) -> None:
    key, value = copy.key_new[:, :, 0], copy.value_new[:, :, 0]
    append(key, value, map, copy.key, copy.value, codes, scales, clock.held, **of_codes)
