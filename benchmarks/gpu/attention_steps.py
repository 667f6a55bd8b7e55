"""Attention steps of one layer: as `runtime.decode` captures them, and in parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from kvcal.kernels.score import score
from kvcal.runtime.attention import SoftmaxSpec
from kvcal.runtime.fixed_step import Clock, FixedStep
from kvcal.runtime.methods.base import Selected
from kvcal.runtime.methods.basis import Basis
from kvcal.runtime.methods.choosing import Counts, attend_selected, choose
from kvcal.runtime.methods.clusterkv import ClusterKV, ClusterKVPolicy
from kvcal.runtime.methods.full import Full
from kvcal.runtime.methods.loki import Loki, LokiPolicy
from kvcal.runtime.settings import new_store
from kvcal.runtime.store import Store

from .caches import Copy, fill_clustered, fill_pages
from .codebook import fitted, settings
from .sizes import SPECTRAL, Sizes

Call = Callable[[], Any]


@dataclass(frozen=True)
class Method:
    step: Callable[[], Tensor]
    """Writes the new token and attends: [B, Hq, 1, Dv]."""
    parts: dict[str, Call]
    """What it is made of, as expected.py names it; what else the step does is the rest."""


def dense(copy: Copy, sizes: Sizes) -> Method:
    store = new_store(Full().bind(0, sizes.dims, None))
    return made(stepped(store, copy, fill_pages), copy, sizes)


def spectral(copy: Copy, sizes: Sizes, name: str) -> Method:
    store = new_store(settings(sizes, name).bind(0, sizes.dims, fitted(sizes, copy.basis)))
    return made(stepped(store, copy, fill_pages), copy, sizes)


def loki(copy: Copy, sizes: Sizes, basis: str, sampled: bool = False) -> Method:
    """
    Args:
        basis: "pca": keys lie in it, and their first dimensions are the index; "score": an index of its own.
        sampled: the tokens are chosen by a threshold, in the kernel that attends to them.
    """
    of, map = loki_settings(sizes, basis, sampled), copy.basis[:, : sizes.rank].contiguous()
    maps = copy.basis if basis == "pca" else map
    policy = LokiPolicy(of, Basis(maps, maps, sizes.rank))
    step = stepped(Store(policy), copy, fill_pages)
    cache = step.cache()
    counts = Counts.of(of, cache.metadata)
    if counts is None or sampled:
        return made(step, copy, sizes)
    reduced = cache.tokens("key" if basis == "pca" else "projected")[..., : sizes.rank]
    scored = partial(score, copy.grouped @ map.mT, reduced, cache.metadata.seq_lens, scaling=sizes.scaling)
    scores = scored()

    def select() -> Selected:
        return choose(scores, counts, of.select)

    attend = partial(attend_selected, policy.query(copy.query), cache, select(), SoftmaxSpec(sizes.scaling))
    return made(step, copy, sizes, {"score": scored, "select": select, "attend": attend})


def clusterkv(copy: Copy, sizes: Sizes, per_cluster: int) -> Method:
    """The selection of clusters is the rest."""
    policy, spec = ClusterKVPolicy(cluster_settings(sizes, per_cluster), None), SoftmaxSpec(sizes.scaling)
    step = stepped(Store(policy), copy, partial(fill_clustered, sizes=sizes))
    cache = step.cache()
    selected = policy.step(copy.query, cache, spec).selected
    if selected is None:
        return made(step, copy, sizes)
    return made(step, copy, sizes, {"attend": partial(attend_selected, copy.query, cache, selected, spec)})


def loki_settings(sizes: Sizes, basis: str, sampled: bool = False) -> Loki:
    return Loki(
        rank=sizes.rank, keep=sizes.keep, select="max", basis=basis, sinks=0, recent=0, sample=sizes.sample,
        choice="sampled" if sampled else "exact",
    )  # fmt: skip


def cluster_settings(sizes: Sizes, per_cluster: int) -> ClusterKV:
    return ClusterKV(
        keep=sizes.keep, select="max", tokens_per_cluster=per_cluster, window=sizes.window, sinks=sizes.sinks
    )


def methods(sizes: Sizes) -> dict[str, Callable[[Copy], Method]]:
    found: dict[str, Callable[[Copy], Method]] = {
        "dense": partial(dense, sizes=sizes),
        "loki": partial(loki, sizes=sizes, basis="pca"),
        "loki, own index": partial(loki, sizes=sizes, basis="score"),
        "loki, sampled": partial(loki, sizes=sizes, basis="score", sampled=True),
    }
    for name in SPECTRAL:
        found[name] = partial(spectral, sizes=sizes, name=name)
    for per_cluster in sizes.per_cluster:
        found[f"clusterkv {per_cluster}"] = partial(clusterkv, sizes=sizes, per_cluster=per_cluster)
    return found


def stepped(store: Any, copy: Copy, fill: Callable[[Any, Tensor, Tensor], None]) -> FixedStep:
    """The step of an empty store that is made to hold all tokens of the copy but the last."""
    batch, _, capacity, _ = copy.key.shape
    fill(store, copy.key[:, :, :-1], copy.value[:, :, :-1])
    step = FixedStep(store, Clock([capacity - 1] * batch, copy.key.device))
    step.reserve(capacity)
    return step


def made(step: FixedStep, copy: Copy, sizes: Sizes, parts: dict[str, Call] | None = None) -> Method:
    """
    Args:
        parts: of what comes after the new token is written; None: all of that is one.
    """
    spec = SoftmaxSpec(sizes.scaling)
    parts = parts or {"attend": partial(step.read, copy.query, spec)}
    write = partial(step.write, copy.key_new, copy.value_new)
    return Method(partial(step.step, *copy.new, spec), {"append": write, **parts})
