"""Rows that are difficult to select from, and the definition of a selection: what its tests share."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

INF, NAN = float("inf"), float("nan")
POISON = -7
BOTH = pytest.mark.parametrize("backend", ["triton", "reference"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])

SMALL = {"TILE": 256, "RUN": 8, "SAMPLE": 64, "GRAIN": 32, "SMALLEST_PART": 256, "MOST_PARTS": 4, "WARPS": 1}
"""With these sizes rows beyond 256 are dealt to several programs, and lists beyond 256 are read in several tiles."""


def best(scores: Tensor, length: int, k: int) -> list[int]:
    """The definition: a lexicographic sort of one row by (falling score, rising index)."""
    row = scores.double().cpu().numpy()[:length]
    token = np.flatnonzero(row > -INF)
    return sorted(token[np.lexsort((token, -row[token]))][: max(k, 0)].tolist())


def assert_selects(result, scores, lengths, k, capacity):
    index, count = result
    assert index.dtype == count.dtype == torch.int32 and index.shape == (*scores.shape[:2], capacity)
    for b, h in itertools.product(*map(range, scores.shape[:2])):
        budget = min(capacity, k if isinstance(k, int) else int(k[b]))
        expected = best(scores[b, h], int(lengths[b]), budget)
        assert int(count[b, h]) == len(expected), (b, h)
        assert index[b, h].tolist() == expected + [0] * (capacity - len(expected)), (b, h)
    if index._base is not None:
        assert index._base.flatten()[index.numel() :].eq(POISON).all(), "written beyond the last slot"


def poisoned(rows, capacity, device):
    """Outputs to write, the index as the beginning of a longer buffer."""
    size = torch.Size(rows).numel() * capacity
    buffer = torch.full((size + 8,), POISON, dtype=torch.int32, device=device)
    return buffer[:size].view(*rows, capacity), torch.full(rows, POISON, dtype=torch.int32, device=device)


def difficult(tokens: int, dtype: torch.dtype, device) -> Tensor:
    """[B, 1, tokens]: each row another difficulty, the same in both dtypes."""
    generator = torch.Generator().manual_seed(tokens)
    normal = torch.randn(tokens, generator=generator)
    coin = torch.rand(tokens, generator=generator)
    tiny = torch.finfo(dtype).smallest_normal
    rows = {
        "random": normal,
        "far from zero": 1000 + normal,
        "all equal": torch.full((tokens,), -1.5),
        "few values": (3 * normal).round(),
        "one among equals": torch.zeros(tokens).index_fill(0, torch.tensor([tokens // 3]), 1.0),
        "both zeros": torch.where(coin < 0.5, 0.0, -0.0),
        "zeros among others": torch.where(coin < 0.3, 0.0, torch.where(coin < 0.6, -0.0, normal)),
        "denormal": normal * tiny / 4,
        "some -inf": torch.where(coin < 0.5, -INF, normal),
        "nearly all -inf": torch.where(coin < 0.98, -INF, normal),
        "all -inf": torch.full((tokens,), -INF),
        "some inf": torch.where(coin < 0.05, INF, normal),
        "some NaN": torch.where(coin < 0.2, NAN, torch.where(coin < 0.4, -NAN, normal)),
        "all NaN": torch.full((tokens,), NAN),
        "the last are best": normal + torch.arange(tokens).ge(tokens - tokens // 8) * 100,
        "rising": torch.arange(tokens) / 16 - 20,
        "falling": torch.arange(tokens).neg() / 16 + 20,
        "a tie follows the last chosen": torch.full((tokens,), 2.0),
    }
    return torch.stack(list(rows.values())).to(dtype)[:, None].to(device)


def spoil_beyond(scores: Tensor, lengths: Tensor) -> Tensor:
    """What stands beyond a sequence's length would win every selection."""
    token = torch.arange(scores.shape[-1], device=scores.device)
    beyond = torch.where(token % 2 == 0, INF, NAN).to(scores.dtype)
    return torch.where(token < lengths[:, None, None], scores, beyond)
