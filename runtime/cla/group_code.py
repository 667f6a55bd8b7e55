"""Keys and values of a layer as low-bit coefficients in a basis that a group of neighbouring layers shares.

Layers of a group see nearly the same things in a token, so the coefficients of the layers before tell much of a
layer's key and value. What they do not tell has a basis of its own. With ĉ the coefficients of the group's earlier
layers and of this one as they come back from their codes, a row x of a KV head is kept and restored as

    c = (x - offset - ĉ_earlier back_earlier) basis,    x̂ = offset + ĉ back,    ĉ = (ĉ_earlier, decode(encode(c)))

Keys are meant before their rotary embedding, where they are of lower rank: it is undone before, and done after. The
most important coefficients have 8 bits, the next 4, the others 2 or none (`calibrate/cla/group_fit.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...artifacts import Artifact, KvcalError
from ...kernels.codes import decode, encode, fields_of
from ..kv.pages import LayerCache

STAGE = "xcla"
BITS = (8, 4, 2)
"""Bits of a coefficient: of the most important ones, of the next, of the last."""
SCALE_BYTES = 2
"""A float16 scale for the coefficients of as many bits."""


@dataclass(frozen=True)
class RowCode:
    """How one layer keeps its keys, or its values."""

    offset: Tensor
    """[Hkv, D]."""
    basis: Tensor
    """[Hkv, D, r]: from what the earlier layers do not tell to coefficients."""
    back: Tensor
    """[Hkv, R, D]: from coefficients of the earlier layers, then of this one, to rows."""
    counts: tuple[int, ...]
    """How many coefficients have so many bits, for each of BITS; r in all."""

    @property
    def told(self) -> int:
        """R - r, coefficients of the earlier layers."""
        return self.back.shape[1] - self.basis.shape[2]

    @classmethod
    def load(cls, artifact: Artifact, layer: int, kind: str) -> RowCode:
        """
        Args:
            kind: "key" or "value".
        """
        offset, basis, back, counts = (
            artifact.tensor(STAGE, layer, f"{kind}.{name}") for name in ("offset", "basis", "back", "counts")
        )
        return cls(offset.float(), basis.float(), back.float(), tuple(counts.tolist()))

    def encode(self, rows: Tensor, earlier: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            rows: [B, Hkv, T, D]; earlier: [B, Hkv, T, R - r], coefficients of the group's earlier layers.

        Returns:
            Codes [B, Hkv, T, bytes] uint8 and scales [B, Hkv, T, kinds of bits] float16.
        """
        told = self.offset.unsqueeze(1) + earlier @ self.back[:, : earlier.shape[-1]]
        parts = ((rows.float() - told) @ self.basis).split(self.counts, -1)
        coded = [encode(part, bits) for part, bits in zip(parts, BITS, strict=True) if part.shape[-1]]
        return torch.cat([codes for codes, _ in coded], -1), torch.stack([scales for _, scales in coded], -1)

    def coefficients(self, codes: Tensor, scales: Tensor) -> Tensor:
        """[..., r] float32 from codes [..., bytes] and scales [..., kinds of bits]."""
        used = [(count // fields_of(bits), bits) for count, bits in zip(self.counts, BITS, strict=True) if count]
        parts = zip(codes.split([size for size, _ in used], -1), scales.unbind(-1), used, strict=True)
        return torch.cat([decode(part.contiguous(), scale, bits) for part, scale, (_, bits) in parts], -1)

    def restore(self, coefficients: Tensor) -> Tensor:
        """[B, Hkv, T, D] float32 from [B, Hkv, T, R]."""
        return self.offset.unsqueeze(1) + coefficients @ self.back

    def to(self, device: torch.device) -> RowCode:
        return RowCode(self.offset.to(device), self.basis.to(device), self.back.to(device), self.counts)


def code_bytes(counts: Sequence[int]) -> int:
    """Bytes of codes and scales of a row."""
    used = [(count, bits) for count, bits in zip(counts, BITS, strict=True) if count]
    return sum(count // fields_of(bits) + SCALE_BYTES for count, bits in used)


KINDS = ("key", "value")
KEPT = ("key", "key_scale", "value", "value_scale")
"""Names of token buffers: codes, and their scales."""
Kept = Mapping[str, Tensor]
"""What is kept of tokens in one layer, by the names in KEPT: [B, Hkv, T, …]."""


class GroupCode:
    """How a layer keeps its tokens, and how the earlier layers of its group do."""

    def __init__(self, layers: Sequence[Mapping[str, RowCode]], angles: Tensor):
        """
        Args:
            layers: the codes of "key" and "value" of the group's layers up to this one.
            angles: of the rotary embedding, see `turned`.
        """
        self.layers, self.angles = tuple(layers), angles
        self.own = self.layers[-1]
        self._on = {angles.device: self}

    @classmethod
    def load(cls, artifact: Artifact, layer: int) -> GroupCode:
        """Raises KvcalError: no stage `xcla`."""
        if STAGE not in artifact.stages:
            raise KvcalError(f"{artifact.name} has no stage xcla: make it with `calibrate xcla ARTIFACT --model MODEL`")
        layers = [*earlier_layers(artifact, layer), layer]
        rotated = artifact.layers[layer].pre_rotary == "unrotate"
        angles = artifact.stages[STAGE].tensors["angles"] if rotated else torch.zeros(0, dtype=torch.float64)
        return cls([{kind: RowCode.load(artifact, index, kind) for kind in KINDS} for index in layers], angles)

    def on(self, device: torch.device) -> GroupCode:
        """The same, its tensors on this device."""
        if device not in self._on:
            layers = [{kind: code.to(device) for kind, code in codes.items()} for codes in self.layers]
            self._on[device] = GroupCode(layers, self.angles.to(device))
        return self._on[device]

    def encode(self, key: Tensor, value: Tensor, position: Tensor, earlier: Sequence[Kept]) -> dict[str, Tensor]:
        """What is kept of keys [B, Hkv, T, D] and values [B, Hkv, T, Dv].

        Args:
            position: [T] or [B, T] int64.
            earlier: what the group's earlier layers keep of the same tokens.
        """
        rows = {"key": turned(key.float(), self.angles, position, back=True), "value": value.float()}
        kept: dict[str, Tensor] = {}
        for kind in KINDS:
            told = self._coefficients(kind, earlier, rows[kind])
            kept[kind], kept[f"{kind}_scale"] = self.own[kind].encode(rows[kind], told)
        return kept

    def empty(self, key: Tensor, value: Tensor) -> dict[str, Tensor]:
        """What is kept of no tokens, whose keys are [B, Hkv, 0, D]."""
        assert not key.shape[2], "tokens are kept relative to those of the group's earlier layers"
        kept: dict[str, Tensor] = {}
        for kind, rows in (("key", key), ("value", value)):
            told = rows.new_zeros(*rows.shape[:3], self.own[kind].told, dtype=torch.float32)
            kept[kind], kept[f"{kind}_scale"] = self.own[kind].encode(rows, told)
        return kept

    def restore(self, kept: Sequence[Kept], position: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, Hkv, T, D] and values [B, Hkv, T, Dv], float32.

        Args:
            kept: of the group's layers up to this one.
            position: [T], [B, T] or [B, Hkv, T] int64.
        """
        key, value = (self.own[kind].restore(self._coefficients(kind, kept, kept[0]["key"])) for kind in KINDS)
        return turned(key, self.angles, position), value

    def restore_all(self, cache: LayerCache) -> tuple[Tensor, Tensor]:
        """(keys [B, Hkv, longest, D], values), float32, of every token of a cache, the last as they came."""
        longest, device = cache.metadata.longest, cache.metadata.seq_lens.device
        kept = [
            {name: layer.buffer(name)[:, :, :longest].to(device) for name in KEPT} for layer in (*cache.earlier, cache)
        ]
        rows = self.on(device).restore(kept, cache.metadata.positions())
        if cache.recent is not None:
            cache.recent.over_all(rows, cache.metadata.seq_lens)
        return rows

    def _coefficients(self, kind: str, kept: Sequence[Kept], like: Tensor) -> Tensor:
        """[B, Hkv, T, …] of the layers of `kept`, the group's first ones."""
        found = [like.new_zeros(*like.shape[:3], 0, dtype=torch.float32)]
        for codes, layer in zip(self.layers, kept, strict=False):
            found.append(codes[kind].coefficients(layer[kind], layer[f"{kind}_scale"]))
        return torch.cat(found, -1)

    @property
    def nbytes(self) -> int:
        """Of a token in a KV head, in the layers that its keys and values are restored from."""
        return sum(code_bytes(code.counts) for codes in self.layers for code in codes.values())

    @property
    def map_numbers(self) -> int:
        """Numbers of this layer's maps back to keys and values."""
        return sum(code.offset.numel() + code.back.numel() for code in self.own.values())


def earlier_layers(artifact: Artifact, layer: int) -> list[int]:
    """The layers of a layer's group before it."""
    return artifact.tensor(STAGE, layer, "earlier").tolist()


def turned(rows: Tensor, angles: Tensor, position: Tensor, back: bool = False) -> Tensor:
    """Rows after the rotary embedding of the common, half-split convention; `back`: before it.

    Args:
        rows: [B, H, T, D]; of its dimensions i and i + P make a plane.
        angles: [P] float64, of one position in each plane; none: nothing is rotated.
        position: [T], [B, T] or [B, H, T] int64.
    """
    planes = len(angles)
    if not planes:
        return rows
    angle = position.unsqueeze(-1) * angles
    cos, sin = angle.cos().to(rows.dtype), angle.sin().to(rows.dtype)
    if position.dim() == 2:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    sin = -sin if back else sin
    first, second, rest = rows.split((planes, planes, rows.shape[-1] - 2 * planes), -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)
