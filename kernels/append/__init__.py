"""One launch per decoded token: the new key and value into the cache."""

import torch
from torch import Tensor

from ..backend import choose
from .reference import append as reference

__all__ = ["append"]


def append(
    key_new: Tensor,
    value_new: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Writes one token of each sequence at slot `lengths[b]`; `lengths` itself is advanced by the caller.

    A full sequence (lengths[b] == capacity) is left alone.

    Args:
        key_new: [B, Hkv, D], as it is to be stored.
        value_new: [B, Hkv, Dv].
        key: [B, Hkv, capacity, D], contiguous per token, as the values.
        value: [B, Hkv, capacity, Dv].
        lengths: [B] int32 on the same device: tokens held before this one.
    """
    check_cache("key", key_new, key, lengths)
    check_cache("value", value_new, value, lengths)
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(f"value: received {list(value.shape)}, expected {list(key.shape[:3])} before its last")
    if lengths.dtype != torch.int32 or lengths.device != key.device:
        raise ValueError(f"lengths: received {lengths.dtype} on {lengths.device}, expected int32 on {key.device}")
    run = reference
    if choose(backend, key) == "triton":
        from .triton_kernel import append as run
    run(key_new, value_new, key, value, lengths)


def check_cache(name: str, new: Tensor, cache: Tensor, lengths: Tensor) -> None:
    if cache.dim() != 4 or new.shape != (*cache.shape[:2], cache.shape[3]) or lengths.shape != new.shape[:1]:
        raise ValueError(
            f"{name}: received {list(new.shape)} for a cache {list(cache.shape)} and lengths {list(lengths.shape)}, "
            "expected [B, Hkv, D], [B, Hkv, capacity, D] and [B]"
        )
    if new.stride(-1) != 1 or cache.stride(-1) != 1:
        raise ValueError(f"{name}: expected the numbers of one token to be contiguous")
