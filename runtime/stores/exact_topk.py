"""`exact_topk`: the oracle of every method that selects tokens by an approximate score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ...artifacts import Artifact
from ..attention import Logits
from .clustered import Clustered, ClusteredStore
from .selecting import Chosen


@dataclass(frozen=True)
class ExactTopk(Clustered):
    """The tokens of the highest q·k. It reads every key to find them, so it saves values only."""

    def build(self, layer: int, head_dim: int, artifact: Artifact | None) -> Callable[[], ExactTopkStore]:
        self.check()
        return lambda: ExactTopkStore(self)


class ExactTopkStore(ClusteredStore):
    def _score(self, query: Tensor, logits: Logits) -> Tensor:
        key = self.rows["key"].view
        self._read += key.nbytes
        # In float32, as fused attention adds up: these are the weights, not only a ranking.
        return self._masked(logits.of(query.float() @ key.float().mT))

    def _combine(self, query: Tensor, logits: Logits, own: Tensor, chosen: Chosen) -> Tensor:
        """The scores are the exact logits already: no key is read again."""
        exact = own.gather(-1, chosen.index.expand(*own.shape[:3], -1))
        (value,) = self._gather(("value",), chosen)
        return self._weigh(query, logits, exact, value, chosen, self._rest(query, logits, own, chosen))
