"""One launch per decoded token: the new key and value into the cache, the key's projection into the index."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backend import choose
from ..score.quantize import check_bits, check_clip, rank_of
from .reference import append as reference

__all__ = ["append"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
CODES = {16: FLOATS, 8: (torch.int8,), 4: (torch.uint8,), 2: (torch.uint8,)}


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
    bits: int = 16,
    clip: float = 1.0,
    offset: Tensor | None = None,
    value_sum: Tensor | None = None,
    summed_from: int = 0,
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
        codes: floats [B, Hkv, capacity, r] (16 bits), int8 [B, Hkv, capacity, r] (8), uint8 [B, Hkv, capacity, r/2] (4)
            or [B, Hkv, capacity, r/4] (2): see `kvcal.kernels.score.quantize`. None: there is no index.
        scales: [B, Hkv, capacity] float16 with integer codes, None otherwise.
        lengths: [B] int32 on the same device: tokens held before this one.
        active: [B] bool; None: every row.
        bits, clip: of the codes, as in `quantize`.
        offset: [Hkv, r] float32, contiguous: the index holds map · key − offset.
        value_sum: [B, Hkv, Dv] float32, contiguous: the new values are added to it in rows that hold at least
            `summed_from` tokens already. A second call for the same token adds it again.
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
        check_index(map, key, codes, scales, bits, clip)
        check_float32("offset", offset, (key.shape[1], rank_of(codes, bits)))
    check_float32("value_sum", value_sum, value_new.shape)
    run = reference
    if choose(backend, key) == "triton":
        from .triton_kernel import append as run
    run(
        key_new, value_new, map, key, value, codes, scales, lengths, active, bits, clip, offset, value_sum, summed_from
    )  # fmt: skip


def check_float32(name: str, tensor: Tensor | None, shape: Sequence[int]) -> None:
    if tensor is not None and (
        tensor.dtype != torch.float32 or tensor.shape != tuple(shape) or not tensor.is_contiguous()
    ):
        raise ValueError(
            f"{name}: received {tensor.dtype} {list(tensor.shape)}, expected contiguous float32 {list(shape)}"
        )


def check_cache(name: str, new: Tensor, cache: Tensor, lengths: Tensor) -> None:
    if cache.dim() != 4 or new.shape != (*cache.shape[:2], cache.shape[3]) or lengths.shape != new.shape[:1]:
        raise ValueError(
            f"{name}: received {list(new.shape)} for a cache {list(cache.shape)} and lengths {list(lengths.shape)}, "
            "expected [B, Hkv, D], [B, Hkv, capacity, D] and [B]"
        )
    if new.stride(-1) != 1 or cache.stride(-1) != 1:
        raise ValueError(f"{name}: expected the numbers of one token to be contiguous")


def check_index(map: Tensor | None, key: Tensor, codes: Tensor, scales: Tensor | None, bits: int, clip: float) -> None:
    check_bits(bits)
    check_clip(clip)
    heads, head_dim = key.shape[1], key.shape[3]
    rank = rank_of(codes, bits)
    if codes.dtype not in CODES[bits]:
        expected = "a float dtype" if bits == 16 else CODES[bits][0]
        raise ValueError(f"codes: received {codes.dtype}, expected {expected} for {bits} bits")
    if codes.shape[:3] != key.shape[:3] or codes.stride(-1) != 1:
        raise ValueError(f"codes: received {list(codes.shape)}, expected {list(key.shape[:3])} before its last")
    if bits == 16:
        if scales is not None:
            raise ValueError("scales: received some with 16 bits, expected None")
    elif scales is None or scales.shape != key.shape[:3] or scales.dtype != torch.float16:
        received = "none" if scales is None else f"{scales.dtype} {list(scales.shape)}"
        raise ValueError(f"scales: received {received}, expected float16 {list(key.shape[:3])}")
    if map is None and rank > head_dim:
        raise ValueError(f"codes: received rank {rank} without a map, expected at most the head dim {head_dim}")
    if map is not None and (map.shape != (heads, rank, head_dim) or not map.is_contiguous()):
        raise ValueError(f"map: received {list(map.shape)}, expected contiguous {[heads, rank, head_dim]}")
