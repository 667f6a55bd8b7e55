"""`full`: every token is read at every step; the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ...artifacts import Artifact
from ...kernels.backend import choose
from ...kernels.dense import dense
from ..attention import Logits, attention
from ..kv.pages import DecodeMetadata, LayerCache
from .amounts import check_flag
from .base import Attended, Method, Policy

if TYPE_CHECKING:
    from ..stores.full import FullStore


@dataclass(frozen=True)
class Full(Method):
    """Every token is read at every step."""

    record_mass: bool = False
    """Also accumulate attention per key, so that `h2o` can adopt what this cache prefilled."""

    def check(self) -> None:
        check_flag("record_mass", self.record_mass)

    def not_captured(self) -> str | None:
        return "record_mass has no step of fixed shapes" if self.record_mass else None

    def bind(self, layer: int, head_dim: int, artifact: Artifact | None) -> FullPolicy:
        self.check()
        return FullPolicy()

    def build(self, layer: int, head_dim: int, artifact: Artifact | None) -> Callable[[], FullStore]:
        from ..stores.full import FullStore

        self.check()
        return lambda: FullStore(self.record_mass)


class FullPolicy(Policy):
    def step(self, query: Tensor, cache: LayerCache, logits: Logits) -> Attended:
        return Attended(attend_all(query, *self.rows(cache), cache.metadata, logits), None)


def attend_all(query: Tensor, key: Tensor, value: Tensor, metadata: DecodeMetadata, logits: Logits) -> Tensor:
    """[B, Hq, 1, Dv]: attention of the last tokens to all of their sequences, keys [B, Hkv, longest, D]."""
    if choose("auto", query) == "triton":
        grouped = query.squeeze(2).unflatten(1, (key.shape[1], -1))
        sinks = None if logits.sinks is None else logits.sinks.float()
        out = dense(grouped, key, value, metadata.seq_lens, scaling=logits.scaling, softcap=logits.softcap, sinks=sinks)
        return out.flatten(1, 2).unsqueeze(2)
    valid = metadata.valid()
    return attention(query, key, value, logits, None if valid is None else valid[:, None, None])
