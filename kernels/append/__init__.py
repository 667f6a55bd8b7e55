"""One launch per decoded token: the new key and value into the cache, the key's projection into the index."""

import torch
from torch import Tensor

from ..backend import choose
from ..score.quantize import rank_of
from .reference import append as reference

__all__ = ["append"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def append(
    key_new: Tensor,
    value_new: Tensor,
    map: Tensor | None,
    key: Tensor,
    value: Tensor,
    codes: Tensor | None,
    scales: Tensor | None,
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
        codes: int8 [B, Hkv, capacity, r] (8 bits), uint8 [B, Hkv, capacity, r/2] (4 bits) or floats
            [B, Hkv, capacity, r]: see `kvcal.kernels.score.quantize`. None: there is no index.
        scales: [B, Hkv, capacity] float16 with integer codes, None otherwise.
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
    if codes is not None:
        check_index(map, key, codes, scales)
    run = reference
    if choose(backend, key) == "triton":
        from .triton_kernel import append as run
    run(key_new, value_new, map, key, value, codes, scales, lengths, active)


def check_cache(name: str, new: Tensor, cache: Tensor, lengths: Tensor) -> None:
    if cache.dim() != 4 or new.shape != (*cache.shape[:2], cache.shape[3]) or lengths.shape != new.shape[:1]:
        raise ValueError(
            f"{name}: received {list(new.shape)} for a cache {list(cache.shape)} and lengths {list(lengths.shape)}, "
            "expected [B, Hkv, D], [B, Hkv, capacity, D] and [B]"
        )
    if new.stride(-1) != 1 or cache.stride(-1) != 1:
        raise ValueError(f"{name}: expected the numbers of one token to be contiguous")


def check_index(map: Tensor | None, key: Tensor, codes: Tensor, scales: Tensor | None) -> None:
    heads, head_dim = key.shape[1], key.shape[3]
    rank = rank_of(codes)
    if codes.dtype not in (torch.int8, torch.uint8, *FLOATS):
        raise ValueError(f"codes: received {codes.dtype}, expected int8, uint8 or a float dtype")
    if codes.shape[:3] != key.shape[:3] or codes.stride(-1) != 1:
        raise ValueError(f"codes: received {list(codes.shape)}, expected {list(key.shape[:3])} before its last")
    if codes.dtype in FLOATS:
        if scales is not None:
            raise ValueError(f"scales: received some with codes of {codes.dtype}, expected None")
    elif scales is None or scales.shape != key.shape[:3] or scales.dtype != torch.float16:
        received = "none" if scales is None else f"{scales.dtype} {list(scales.shape)}"
        raise ValueError(f"scales: received {received}, expected float16 {list(key.shape[:3])}")
    if map is None and rank > head_dim:
        raise ValueError(f"codes: received rank {rank} without a map, expected at most the head dim {head_dim}")
    if map is not None and (map.shape != (heads, rank, head_dim) or not map.is_contiguous()):
        raise ValueError(f"map: received {list(map.shape)}, expected contiguous {[heads, rank, head_dim]}")
