"""The definition of `append` in plain torch, without reading a number on the host."""

import torch
from torch import Tensor


def append(
    key_new: Tensor,
    value_new: Tensor,
    map: Tensor | None,
    key: Tensor,
    value: Tensor,
    index: Tensor | None,
    lengths: Tensor,
    active: Tensor | None,
) -> None:
    """Writes into the caches, already checked; see `kvcal.kernels.append.append`."""
    written = lengths < key.shape[2]
    if active is not None:
        written = written & active
    slots = lengths.clamp(0, key.shape[2] - 1).long()
    write(key, key_new, slots, written)
    write(value, value_new, slots, written)
    if index is not None:
        write(index, projected(key_new, map, index.shape[-1]), slots, written)


def projected(key_new: Tensor, map: Tensor | None, rank: int) -> Tensor:
    """[B, Hkv, r] float32: what the index stores of a key."""
    if map is None:
        return key_new[..., :rank].float()
    return torch.einsum("hrd,bhd->bhr", map.float(), key_new.float())


def write(rows: Tensor, new: Tensor, slots: Tensor, written: Tensor) -> None:
    """`rows[b, :, slots[b]] = new[b]` in the rows that are `written`."""
    batch = torch.arange(rows.shape[0], device=rows.device)
    rows[batch, :, slots] = torch.where(written.view(-1, 1, 1), new.to(rows.dtype), rows[batch, :, slots])
