"""What the oracles of all methods are made of: one query head at one token of one row, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from sequences import Row
from torch import Tensor

from kvcal.runtime.attention import SoftmaxSpec


def amount(of: float | int, total: int) -> int:
    """A fraction as it is written, 0.07 being 7/100."""
    wanted = math.ceil(Fraction(str(of)) * total) if isinstance(of, float) else of
    return max(1, min(total, wanted))


@dataclass(frozen=True)
class Head:
    """One query head at one step: its query [D], and all keys and values so far of its KV head."""

    query: Tensor
    key: Tensor
    """[n, D]"""
    value: Tensor
    """[n, Dv]"""
    spec: SoftmaxSpec
    index: int

    def logit(self, dots: Tensor) -> Tensor:
        scaled = dots * self.spec.scaling
        cap = self.spec.softcap
        return scaled if cap is None else cap * torch.tanh(scaled / cap)

    def softmax(self, scores: Tensor) -> Tensor:
        """Weights of the tokens; the model's sink is one more token, which takes its share and has no value."""
        if self.spec.sink_logits is None:
            return scores.softmax(-1)
        return torch.cat((scores, self.spec.sink_logits[self.index : self.index + 1].double())).softmax(-1)[:-1]

    def weights(self, chosen: Tensor) -> Tensor:
        return self.softmax(self.logit(self.key[chosen] @ self.query))

    def attend(self, chosen: Tensor) -> Tensor:
        return self.weights(chosen) @ self.value[chosen]


def heads_at(row: Row, spec: SoftmaxSpec, kv_head: int, tokens: int) -> list[Head]:
    """The query heads of one KV head, at the token that makes it `tokens` tokens."""
    group = row.query.shape[0] // row.key.shape[0]
    key, value = row.key[kv_head, :tokens], row.value[kv_head, :tokens]
    return [
        Head(row.query[index, tokens - 1], key, value, spec, index)
        for index in range(kv_head * group, (kv_head + 1) * group)
    ]


def budget(settings: dict, tokens: int) -> int:
    return tokens if tokens < settings.get("dense_below", 0) else amount(settings.get("keep", 0.25), tokens)
