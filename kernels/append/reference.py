"""The definition of `append` in plain torch, without reading a number on the host."""

import torch
from torch import Tensor

from ..score.quantize import quantize, rank_of


def append(
    key_new: Tensor,
    value_new: Tensor,
    map: Tensor | None,
    key: Tensor,
    value: Tensor,
    codes: Tensor | None,
    scales: Tensor | None,
    lengths: Tensor,
    active: Tensor | None,
    bits: int,
    clip: float,
    offset: Tensor | None,
    value_sum: Tensor | None,
    summed_from: int,
) -> None:
    """Writes into the caches and `value_sum`, already checked; see `kvcal.kernels.append.append`."""
    written = lengths < key.shape[2]
    if active is not None:
        written = written & active
    slots = lengths.clamp(0, key.shape[2] - 1).long()
    write(key, key_new, slots, written)
    write(value, value_new, slots, written)
    if codes is not None:
        entry = projected(key_new, map, rank_of(codes, bits))
        new_codes, new_scales = quantize(entry if offset is None else entry - offset, bits, clip)
        write(codes, new_codes, slots, written)
        if scales is not None and new_scales is not None:
            write(scales, new_scales, slots, written)
    if value_sum is not None:
        adds = (written & (lengths >= summed_from)).view(-1, 1, 1)
        value_sum += value_new.float().masked_fill(~adds, 0)


def projected(key_new: Tensor, map: Tensor | None, rank: int) -> Tensor:
    """[B, Hkv, r] float32: what the index stores of a key."""
    if map is None:
        return key_new[..., :rank].float()
    return torch.einsum("hrd,bhd->bhr", map.float(), key_new.float())


def write(rows: Tensor, new: Tensor, slots: Tensor, written: Tensor) -> None:
    """`rows[b, :, slots[b]] = new[b]` in the rows that are `written`."""
    batch = torch.arange(rows.shape[0], device=rows.device)
    keep = written.view(-1, *[1] * (new.dim() - 1))
    rows[batch, :, slots] = torch.where(keep, new.to(rows.dtype), rows[batch, :, slots])
