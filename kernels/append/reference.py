"""The definition of `append` in plain torch, without reading a number on the host."""

import torch
from torch import Tensor


def append(key_new: Tensor, value_new: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> None:
    """Writes into the caches, already checked; see `kvcal.kernels.append.append`."""
    written = lengths < key.shape[2]
    slots = lengths.clamp(0, key.shape[2] - 1).long()
    write(key, key_new, slots, written)
    write(value, value_new, slots, written)


def write(cache: Tensor, new: Tensor, slots: Tensor, written: Tensor) -> None:
    """`cache[b, :, slots[b]] = new[b]` in the sequences that are `written`."""
    batch = torch.arange(cache.shape[0], device=cache.device)
    cache[batch, :, slots] = torch.where(written.view(-1, 1, 1), new.to(cache.dtype), cache[batch, :, slots])
