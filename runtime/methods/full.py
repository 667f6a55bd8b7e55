"""`full`: every token is read at every step; the reference."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...artifacts import Artifact
from ...kernels.backend import choose
from ...kernels.dense import dense
from ..attention import Logits, attention, probabilities
from ..kv.pages import DecodeMetadata, LayerCache
from .amounts import check_count, check_flag
from .base import Attended, Method, Policy


@dataclass(frozen=True)
class Full(Method):
    """Every token is read at every step."""

    record_mass: bool = False
    """Also accumulate attention per key, so that `h2o` can adopt what this cache prefilled."""

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

    def not_captured(self) -> str | None:
        return "record_queries keeps the query of every step" if self.record_queries else None

    def bind(self, layer: int, head_dim: int, artifact: Artifact | None) -> FullPolicy:
        self.check()
        return FullPolicy(self.record_mass, self.record_queries)


class FullPolicy(Policy):
    def __init__(self, record_mass: bool = False, record_queries: int = 0):
        self.accumulates, self.observes = record_mass, record_queries

    def step(self, query: Tensor, cache: LayerCache, logits: Logits) -> Attended:
        key, value = self.keys_values(cache)
        out = attend_all(query, key, value, cache.metadata, logits)
        if not self.accumulates:
            return Attended(out, None)
        return Attended(out, None, weights(query, key, cache.metadata, logits).sum((2, 3)))


def attend_all(query: Tensor, key: Tensor, value: Tensor, metadata: DecodeMetadata, logits: Logits) -> Tensor:
    """[B, Hq, 1, Dv]: attention of the last tokens to all of their sequences, keys [B, Hkv, longest, D]."""
    if choose("auto", query) == "triton":
        grouped = query.squeeze(2).unflatten(1, (key.shape[1], -1))
        sinks = None if logits.sinks is None else logits.sinks.float()
        out = dense(grouped, key, value, metadata.seq_lens, scaling=logits.scaling, softcap=logits.softcap, sinks=sinks)
        return out.flatten(1, 2).unsqueeze(2)
    valid = metadata.valid()
    return attention(query, key, value, logits, None if valid is None else valid[:, None, None])


def weights(query: Tensor, key: Tensor, metadata: DecodeMetadata, logits: Logits) -> Tensor:
    """[B, Hkv, G, 1, longest] float32: what each token receives of the attention of its sequence's last one."""
    valid = metadata.valid()
    return probabilities(query, key, logits, None if valid is None else valid[:, None, None])
