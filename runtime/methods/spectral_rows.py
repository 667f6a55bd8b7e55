"""`spectral` with `rows="xcla"`: what a step reads exactly is restored from the coefficients of a group of layers.

Tokens are chosen as ever, by codes of the keys as they came. Pages have no corrections: their values would have to be
restored to make them, so a codeword's value alone stands for its unselected tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...kernels.codes import encode_tokens
from ..attention import SoftmaxSpec
from ..cla.group_code import KEPT, GroupCode, Kept
from ..kv.pages import LayerCache
from .base import Reading, Selected, Widths
from .codewords import Codewords
from .scanning import Scan
from .spectral import ByName, Spectral, SpectralPolicy, normalised
from .xcla import bytes_of_all, recent_bytes


class GroupedRows(SpectralPolicy):
    grouped = True

    def __init__(self, settings: Spectral, codewords: Codewords, code: GroupCode, earlier: Sequence[int]):
        super().__init__(settings, codewords)
        self.code, self.earlier, self.token_names = code, tuple(earlier), KEPT
        self.recent_rows = settings.recent

    def encode(self, key: Tensor, value: Tensor) -> Mapping[str, Tensor]:
        """Of no tokens: what is kept of tokens is told by `encode_after`."""
        return {**self._chosen_by(key, value), **self.code.on(key.device).empty(key, value)}

    def encode_after(
        self, key: Tensor, value: Tensor, position: Tensor, earlier: Sequence[Kept]
    ) -> Mapping[str, Tensor]:
        kept = self.code.on(key.device).encode(key, value, position, earlier)
        return {**self._chosen_by(key, value), **kept}

    def _chosen_by(self, key: Tensor, value: Tensor) -> dict[str, Tensor]:
        """The codes that tokens are chosen by."""
        return encode_tokens(key, value, self.codewords.on(key.device), self.settings.bits, coded=False)

    def summarise(self, page: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {}

    def append(self, cache: LayerCache, key: Tensor, value: Tensor) -> bool:
        return False

    def _scan(self, cache: LayerCache) -> Scan | None:
        return None

    def keys_values(self, cache: LayerCache) -> tuple[Tensor, Tensor]:
        return self.code.restore_all(cache)

    def _read(
        self, tables: ByName, grouped: Tensor, cache: LayerCache, selected: Selected, words: Tensor, spec: SoftmaxSpec
    ) -> tuple[Tensor, Tensor]:
        index = selected.index
        flat = index.flatten(2)
        kept = [
            {name: _gather(layer.buffer(name).to(flat.device), flat) for name in KEPT}
            for layer in (*cache.earlier, cache)
        ]
        rows = self.code.on(flat.device).restore(kept, flat)
        assert cache.recent is not None
        rows = cache.recent.over(rows, flat, cache.metadata.seq_lens)
        key, value = (part.unflatten(2, index.shape[2:]) for part in rows)
        dots = (grouped.unsqueeze(3) @ key.mT).squeeze(3)
        weights, lse = normalised(spec.logits(dots).masked_fill(~selected.valid, -torch.inf))
        return (weights.unsqueeze(3) @ value).squeeze(3), lse

    def token_bytes(self, widths: Widths) -> int:
        return self.code.nbytes

    def selection_bytes(self, reading: Reading) -> int:
        token = sum(reading.widths[name] for name in ("codeword", "code", "scale"))
        return reading.heads * reading.tokens() * token + recent_bytes(self.recent_rows, reading)

    def dense_bytes(self, reading: Reading) -> int:
        return bytes_of_all(self.code, self.recent_rows, reading)

    def shared_bytes(self, widths: Widths) -> int:
        return super().shared_bytes(widths) + 2 * self.code.map_numbers


def _gather(held: Tensor, index: Tensor) -> Tensor:
    """[B, Hkv, K, n]: the tokens `index` [B, Hkv, K] of [B, Hkv, S, n]."""
    return held.gather(2, index.unsqueeze(-1).expand(*index.shape, held.shape[-1]))
