"""Attention steps of one layer: as `runtime.decode` captures them, and in parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from caches import Copy, fill, fill_clusters, fill_pages
from codebook import fitted, settings
from sizes import Sizes
from torch import Tensor

from kvcal.kernels.append import append
from kvcal.kernels.attend import attend, attend_runs
from kvcal.kernels.score import score
from kvcal.kernels.select import select
from kvcal.runtime.attention import Logits
from kvcal.runtime.methods.full import Full
from kvcal.runtime.static import Clock, Step, make_step
from kvcal.runtime.stores.basis import Basis
from kvcal.runtime.stores.clusterkv import ClusterKV, ClusterKVStore
from kvcal.runtime.stores.full import FullStore
from kvcal.runtime.stores.loki import Loki, LokiStore
from kvcal.runtime.stores.paged import PagedStore

Call = Callable[[], Any]


@dataclass(frozen=True)
class Method:
    step: Callable[[], Tensor]
    """Writes the new token and attends: [B, Hq, 1, Dv]."""
    parts: dict[str, Call]
    """The launches it is made of, as expected.py names them; what else the step does is the rest."""


def dense_method(copy: Copy, sizes: Sizes) -> Method:
    clock, logits = _clock(copy), Logits(sizes.scaling)
    store = FullStore()
    fill_pages(store, copy.key[:, :, :-1], copy.value[:, :, :-1])
    step = _step(Full(), store, clock, copy)
    parts: dict[str, Call] = {
        "append": partial(step.write, copy.key_new[:, :, 0], copy.value_new[:, :, 0]),
        "attend": partial(step.read, copy.query, logits),
    }
    return Method(partial(step.step, *copy.new, logits), parts)


def loki(copy: Copy, sizes: Sizes, basis: str) -> Method:
    """Args: basis: "pca": keys lie in it, and their first dimensions are the index; "score": an index of its own."""
    clock, logits, length = _clock(copy), Logits(sizes.scaling), copy.key.shape[2]
    map, own = copy.basis[:, : sizes.rank].contiguous(), basis == "score"
    index = copy.key @ map.mT if own else copy.key[..., : sizes.rank]
    of = Loki(rank=sizes.rank, keep=sizes.keep, select="max", basis=basis)
    maps = map if own else copy.basis
    store = LokiStore(of, Basis(maps, maps, sizes.rank))
    fill(store, length - 1, {"key": copy.key, "value": copy.value, **({"index": index} if own else {})})
    step = _step(of, store, clock, copy)
    grouped, scaling, seen = copy.grouped, sizes.scaling, clock.seen
    arrivals = torch.zeros(copy.key.shape[:2].numel(), dtype=torch.int32, device=copy.key.device)
    # As the step has them: scores in half the bytes, one choice for the group.
    scored: dict[str, Any] = {"scaling": scaling, "combine": "max", "out_dtype": torch.float16}
    projected = grouped @ map.mT
    scores = score(projected, index, seen, **scored)
    chosen = select(scores, sizes.keep, seen, arrivals=arrivals)
    parts: dict[str, Call] = {
        "append": partial(_append, copy, clock, *((map, index) if own else ())),
        "project": lambda: grouped @ map.mT,
        "score": partial(score, projected, index, seen, **scored),
        "select": partial(select, scores, sizes.keep, seen, arrivals=arrivals),
        "attend": partial(attend, grouped, copy.key, copy.value, *chosen, scaling=scaling),
    }
    return Method(partial(step.step, *copy.new, logits), parts)


def clusterkv(copy: Copy, sizes: Sizes, per_cluster: int) -> Method:
    of = ClusterKV(
        keep=sizes.keep, select="max", tokens_per_cluster=per_cluster, window=sizes.window, sinks=sizes.sinks
    )
    clock, logits, length = _clock(copy), Logits(sizes.scaling), copy.key.shape[2]
    store = ClusterKVStore(of, None)
    fill(store, length - 1, {"key": copy.key, "value": copy.value})
    fill_clusters(store, sizes, length - 1, per_cluster)
    step = _step(of, store, clock, copy)
    grouped, scaling = copy.grouped, sizes.scaling
    scores = step.scores(grouped, logits)
    runs = step.choose(scores)
    longest = of.most(length)
    parts: dict[str, Call] = {
        "append": partial(_append, copy, clock),
        "score": partial(step.scores, grouped, logits),
        "select": partial(step.choose, scores),
        "attend": partial(attend_runs, grouped, copy.key, copy.value, *runs, scaling=scaling, most=longest),
    }
    return Method(partial(step.step, *copy.new, logits), parts)


def spectral(copy: Copy, sizes: Sizes) -> Method:
    clock, logits, of = _clock(copy), Logits(sizes.scaling), settings(sizes)
    store = PagedStore(of.bind(0, sizes.dims, fitted(sizes, copy.basis)))
    fill_pages(store, copy.key[:, :, :-1], copy.value[:, :, :-1])
    step = _step(of, store, clock, copy)
    parts: dict[str, Call] = {
        "append": partial(step.write, copy.key_new[:, :, 0], copy.value_new[:, :, 0]),
        "attend": partial(step.read, copy.query, logits),
    }
    return Method(partial(step.step, *copy.new, logits), parts)


def methods(sizes: Sizes) -> dict[str, Callable[[Copy], Method]]:
    found: dict[str, Callable[[Copy], Method]] = {
        "dense": partial(dense_method, sizes=sizes),
        "loki": partial(loki, sizes=sizes, basis="pca"),
        "loki, own index": partial(loki, sizes=sizes, basis="score"),
        "spectral": partial(spectral, sizes=sizes),
    }
    for per_cluster in sizes.per_cluster:
        found[f"clusterkv {per_cluster}"] = partial(clusterkv, sizes=sizes, per_cluster=per_cluster)
    return found


def _clock(copy: Copy) -> Clock:
    batch, _, capacity, _ = copy.key.shape
    return Clock([capacity - 1] * batch, copy.key.device)


def _step(method: Any, store: Any, clock: Clock, copy: Copy) -> Any:
    step: Step = make_step(method, store, clock)
    step.reserve(copy.key.shape[2])
    return step


def _append(copy: Copy, clock: Clock, map: Tensor | None = None, index: Tensor | None = None) -> None:
    append(copy.key_new[:, :, 0], copy.value_new[:, :, 0], map, copy.key, copy.value, index, clock.held)
