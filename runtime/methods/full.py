"""`full`: every token is read at every step; the reference."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...artifacts import Artifact
from ...kernels.backend import choose
from ...kernels.dense import dense, fits
from ..attention import SoftmaxSpec, attention, probabilities
from ..kv.pages import RECEIVED, DecodeMetadata, LayerCache
from .amounts import check_count, check_flag
from .base import Attended, Method, Policy

MANY = 4096
"""Tokens from which numba takes dense attention on a CPU: with few its call costs more than it saves."""


@dataclass(frozen=True)
class Full(Method):
    """Every token is read at every step."""

    in_numba = True
    record_mass: bool = False
    """Also add up the attention that each token receives, so that `h2o` can adopt what this cache prefilled."""

    record_queries: int = 0
    """Also keep so many of a prompt's last queries, so that `snapkv` can adopt what this cache prefilled."""

    def check(self) -> None:
        check_flag("record_mass", self.record_mass)
        check_count("record_queries", self.record_queries)

    def not_shared(self) -> str | None:
        if not self.record_mass and not self.record_queries:
            return None
        return (
            "record_mass and record_queries are of one layer's queries, for methods that cannot share: leave them out"
        )

    def not_paged(self) -> str | None:
        if not self.record_mass and not self.record_queries:
            return None
        return "record_mass and record_queries are of a sequence, and belong to no page: leave them out"

    def not_captured(self) -> str | None:
        return "record_queries keeps the query of every step" if self.record_queries else None

    def captured_at(self, longest: int) -> bool:
        return self.not_captured() is None

    def bind(self, layer: int, head_dim: int, artifact: Artifact | None) -> FullPolicy:
        self.check()
        return FullPolicy(self.record_mass, self.record_queries)


class FullPolicy(Policy):
    def __init__(self, record_mass: bool = False, record_queries: int = 0):
        self.accumulates, self.observes = record_mass, record_queries

    def step(self, query: Tensor, cache: LayerCache, spec: SoftmaxSpec) -> Attended:
        out = attend_all(self, query, cache, spec)
        if RECEIVED not in cache.pages:  # nothing is recorded, or no more since a crop
            return Attended(out, None)
        return Attended(out, None, weights(query, cache.tokens("key"), cache.metadata, spec).sum((2, 3)))


def attend_all(policy: Policy, query: Tensor, cache: LayerCache, spec: SoftmaxSpec) -> Tensor:
    """[B, Hq, 1, Dv]: attention of the last tokens to all of their sequences.

    Args:
        query: [B, Hq, 1, D], of which dot products with the keys of `policy.keys_values` are taken.
    """
    metadata = cache.metadata
    kernel, table = choose("auto", query, numba=metadata.longest >= MANY), metadata.table
    if table is not None:  # else, or where no kernel takes pages as they are, keys and values are copied in order
        key, value = cache.part("key"), cache.part("value")
        if kernel == "reference" or key.dtype != query.dtype or (kernel == "numba" and not fits(key, value)):
            table = None
    if table is None:
        key, value = (tensor.to(query.dtype) for tensor in policy.keys_values(cache))
    if kernel == "triton" or (kernel == "numba" and query.dtype == key.dtype == value.dtype and fits(key, value)):
        grouped = query.squeeze(2).unflatten(1, (key.shape[1], -1))
        sink_logits = None if spec.sink_logits is None else spec.sink_logits.float()
        out = dense(
            grouped, key, value, metadata.seq_lens, scaling=spec.scaling, softcap=spec.softcap, sink_logits=sink_logits,
            table=table,
        )  # fmt: skip
        return out.flatten(1, 2).unsqueeze(2)
    valid = metadata.valid()
    return attention(query, key, value, spec, None if valid is None else valid[:, None, None])


def weights(query: Tensor, key: Tensor, metadata: DecodeMetadata, spec: SoftmaxSpec) -> Tensor:
    """[B, Hkv, G, 1, longest] float32: the attention that each token receives from its sequence's last one."""
    valid = metadata.valid()
    return probabilities(query, key, spec, None if valid is None else valid[:, None, None])
