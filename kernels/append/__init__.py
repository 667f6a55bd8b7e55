"""One launch per decoded token: the new key and value into the cache, the key's projection into the index."""

import torch
from torch import Tensor

from ..backend import choose
from .reference import append as reference

__all__ = ["append"]


def append(
    key_new: Tensor,
    value_new: Tensor,
    map: Tensor | None,
    key: Tensor,
    value: Tensor,
    index: Tensor | None,
    lengths: Tensor,
    active: Tensor | None = None,
    *,
    backend: str = "auto",
) -> None:
    """Writes one token of each row at slot `lengths[b]`; `lengths` itself is advanced by the caller.

    A row that is full (lengths[b] == capacity) is left alone, as one that is not active.

    Args:
        key_new: [B, Hkv, D], as it is to be stored.
        value_new: [B, Hkv, Dv].
        map: [Hkv, r, D], contiguous: the index holds map · key; None: it holds the key's first r dimensions.
        key: [B, Hkv, capacity, D], contiguous per token, as all that follow.
        value: [B, Hkv, capacity, Dv].
        index: [B, Hkv, capacity, r] of floats; None: there is none.
        lengths: [B] int32 on the same device: tokens held before this one.
        active: [B] bool; None: every row.
    """
    check_cache("key", key_new, key, lengths)
    check_cache("value", value_new, value, lengths)
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(f"value: received {list(value.shape)}, expected {list(key.shape[:3])} before its last")
    if lengths.dtype != torch.int32 or lengths.device != key.device:
        raise ValueError(f"lengths: received {lengths.dtype} on {lengths.device}, expected int32 on {key.device}")
    if active is not None and (active.shape != lengths.shape or active.dtype != torch.bool):
        raise ValueError(f"active: received {active.dtype} {list(active.shape)}, expected bool {list(lengths.shape)}")
    if index is not None:
        check_index(map, key, index)
    run = reference
    if choose(backend, key) == "triton":
        from .triton_kernel import append as run
    run(key_new, value_new, map, key, value, index, lengths, active)


def check_cache(name: str, new: Tensor, cache: Tensor, lengths: Tensor) -> None:
    if cache.dim() != 4 or new.shape != (*cache.shape[:2], cache.shape[3]) or lengths.shape != new.shape[:1]:
        raise ValueError(
            f"{name}: received {list(new.shape)} for a cache {list(cache.shape)} and lengths {list(lengths.shape)}, "
            "expected [B, Hkv, D], [B, Hkv, capacity, D] and [B]"
        )
    if new.stride(-1) != 1 or cache.stride(-1) != 1:
        raise ValueError(f"{name}: expected the numbers of one token to be contiguous")


def check_index(map: Tensor | None, key: Tensor, index: Tensor) -> None:
    heads, head_dim, rank = key.shape[1], key.shape[3], index.shape[-1]
    if not index.is_floating_point():
        raise ValueError(f"index: received {index.dtype}, expected a float dtype")
    if index.shape[:3] != key.shape[:3] or index.stride(-1) != 1:
        raise ValueError(
            f"index: received {list(index.shape)}, expected {list(key.shape[:3])} before its last, which is contiguous"
        )
    if map is None and rank > head_dim:
        raise ValueError(f"index: received rank {rank} without a map, expected at most the head dim {head_dim}")
    if map is not None and (map.shape != (heads, rank, head_dim) or not map.is_contiguous()):
        raise ValueError(f"map: received {list(map.shape)}, expected contiguous {[heads, rank, head_dim]}")
