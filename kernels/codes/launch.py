"""The kernel in numba, called with tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cpu import nothing, run
from . import LARGEST_SCALE, STEP, cpu

NAMES = ("key", "value", "half", "inverse", "key_map")


def tables_of(tables: Mapping[str, Tensor], coded: bool) -> cpu.Tables:
    """
    Args:
        coded: whether rows are codes, too.
    """
    turns = [tables[name].numpy() if coded else nothing(0, 0, dtype=np.float32) for name in ("turn_key", "turn_value")]
    return cpu.Tables(*(tables[name].numpy() for name in NAMES), *turns)


def encode_tokens(key: Tensor, value: Tensor, tables: cpu.Tables, bits: int) -> dict[str, Tensor]:
    """What is kept beside keys [B, Hkv, T, D] and values [B, Hkv, T, Dv]: "codeword", "code", "scale"; and in place of
    them, where tables have rotations, "key", "value", "key_scale", "value_scale"."""
    shape, coded, rank = tuple(key.shape[:3]), tables.turn_key.size > 0, tables.key_map.shape[2]
    width, value_width = key.shape[3], value.shape[3]
    kept = cpu.Kept(
        np.empty((*shape, 1), np.uint8), np.empty((*shape, rank * bits // 8), np.uint8), np.empty(shape, np.float32),
        np.empty((*shape, width if coded else 0), np.uint8), np.empty((*shape, value_width if coded else 0), np.uint8),
        np.empty((2, *shape), np.float32),
    )  # fmt: skip
    workspace = np.empty((math.prod(shape), 2, max(width, value_width)), np.float32)
    run(
        cpu.encode_tokens, key.detach().float().contiguous().numpy(), value.detach().float().contiguous().numpy(),
        tables, bits, np.float32(STEP.get(bits, np.inf)), np.float32(np.inf), workspace, kept,
    )  # fmt: skip
    found = {"codeword": torch.from_numpy(kept.codeword), "code": torch.from_numpy(kept.code)}
    found["scale"] = scales(kept.scale)
    if coded:
        key_scale, value_scale = scales(kept.row_scales)
        found |= {"key": torch.from_numpy(kept.key), "value": torch.from_numpy(kept.value)}
        found |= {"key_scale": key_scale, "value_scale": value_scale}
    return found


def scales(numbers: Any) -> Tensor:
    """[…] -> […, 1] float16."""
    return torch.from_numpy(numbers).unsqueeze(-1).clamp_(max=LARGEST_SCALE).half()
