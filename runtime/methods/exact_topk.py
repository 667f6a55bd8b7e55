"""`exact_topk`: the oracle of every method that selects tokens by an approximate score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...artifacts import Artifact
from ..attention import SoftmaxSpec
from ..kv.pages import LayerCache
from .base import Attended, Method, Policy, Reading, Widths
from .choosing import Counts, Selection, choose
from .full import attend_all


@dataclass(frozen=True)
class ExactTopk(Selection, Method):
    """The tokens of the highest q·k. It reads every key to find them, so it saves values only."""

    def not_paged(self) -> str | None:
        return "it reads every key, to measure others by: a server gains nothing"

    def bind(self, layer: int, head_dim: int, artifact: Artifact | None) -> ExactTopkPolicy:
        self.check()
        return ExactTopkPolicy(self)


class ExactTopkPolicy(Policy):
    def __init__(self, settings: ExactTopk):
        self.settings = settings

    def step(self, query: Tensor, cache: LayerCache, spec: SoftmaxSpec) -> Attended:
        settings, metadata = self.settings, cache.metadata
        counts = metadata.once((settings, type(settings.keep)), lambda: Counts.of(settings, metadata))
        if counts is None:
            return Attended(attend_all(self, query, cache, spec), None)
        key = cache.tokens("key")
        grouped = query.squeeze(2).unflatten(1, (key.shape[1], -1))
        # In float32, as fused attention adds up: these are the weights, not only a ranking.
        exact = spec.logits(grouped.float() @ key.float().mT)
        if (valid := metadata.valid()) is not None:
            exact = exact.masked_fill(~valid[:, None, None], -torch.inf)
        selected = choose(exact, counts, settings.select)
        index = selected.index
        weights = exact.gather(-1, index.expand(*exact.shape[:3], -1)).masked_fill(~selected.valid, -torch.inf)
        (value,) = cache.gather(("value",), index.flatten(2), selected.valid.flatten(2))
        value = value.unflatten(2, index.shape[2:]).float()
        out = (spec.softmax(weights).unsqueeze(3) @ value).squeeze(3)
        return Attended(out.flatten(1, 2).unsqueeze(2).to(query.dtype), selected)

    def token_bytes(self, widths: Widths) -> int:
        """The value of a selected token alone: `selection_bytes` counts its key, which was read to score it."""
        return widths["value"]

    def selection_bytes(self, reading: Reading) -> int:
        return reading.tokens() * reading.heads * reading.widths["key"]
