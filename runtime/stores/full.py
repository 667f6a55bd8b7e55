"""`full` as the store that other methods take their first tokens over from."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention import Logits, attention_mass, probabilities
from ..kv.buffers import lengths_mask
from ..kv.saved import Saved, require
from ..methods.full import FullPolicy
from .paged import PagedStore


class FullStore(PagedStore):
    def __init__(self, record_mass: bool = False):
        super().__init__(FullPolicy())
        self.record_mass = record_mass

    def prefill(self, query: Tensor, key: Tensor, value: Tensor, logits: Logits, valid: Tensor | None = None) -> Tensor:
        out = super().prefill(query, key, value, logits, valid)
        if self.record_mass:
            self._record(attention_mass(query, self.rows["key"].view, logits, self._limits))
        return out

    def attend(self, query: Tensor, logits: Logits) -> Tensor:
        if self.record_mass:
            key = self.rows["key"].view
            held = lengths_mask(self.lengths, key.device)
            self._record(probabilities(query, key, logits, held).sum((2, 3)))
        return super().attend(query, logits)

    def adopt(self, full: FullStore) -> None:
        super().adopt(full)
        if self.record_mass and "mass" in full.totals:
            self._record(full.totals["mass"].clone())

    def crop(self, tokens: int) -> None:
        super().crop(tokens)
        # What the cropped queries gave cannot be told from the sums.
        self.record_mass = False
        self.totals.pop("mass", None)

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        self.record_mass = self.record_mass and ("mass" in self.totals or not self.seen)

    def lengths_changed(self) -> None:
        super().lengths_changed()
        if "mass" in self.totals:
            self.totals["mass"] = self.totals["mass"][:, :, : max(self.lengths)]

    def _check(self, saved: Saved) -> None:
        super()._check(saved)
        if self.record_mass and saved.has("totals.mass"):
            mass = saved.take("totals.mass", torch.float32, *saved.key.shape[:3])
            require("totals.mass", mass >= 0, "no negative attention")

    def _record(self, mass: Tensor) -> None:
        """Accumulate what every key received of the attention so far, for a store that starts from this one."""
        past = self.totals.get("mass")
        if past is not None:
            mass[:, :, : past.shape[2]] += past
        self.totals["mass"] = mass
