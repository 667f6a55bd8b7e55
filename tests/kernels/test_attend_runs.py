"""Runs of tokens against one float64 softmax per query; and what a program's share of the tokens is."""

import pytest
import torch
from attention_oracle import attention, make, poison, poisoned_empty, tokens
from tolerances import assert_close

from kvcal.kernels.attend import attend_runs

BOTH = pytest.mark.parametrize("backend", ["reference", "triton"])


@pytest.fixture(autouse=True)
def _no_workspace_is_zero(monkeypatch):
    monkeypatch.setattr(torch, "empty", poisoned_empty)


def slots_of(starts, sizes):
    """What [.., R] runs cover, one list for each."""
    return [
        [slot for start, size in zip(*runs, strict=True) for slot in range(start, start + size)]
        for runs in zip(starts.flatten(0, -2).tolist(), sizes.flatten(0, -2).tolist(), strict=True)
    ]


def check(device, backend, starts, sizes, heads=2, group=3, capacity=250, dtype=torch.float32, given=None, **options):
    """starts, sizes: [B, Hkv, R] or [B, Hkv, G, R] of what counts; given: the sizes that are handed over, if others."""
    generator = torch.Generator().manual_seed(3)
    starts, sizes = (torch.tensor(of, dtype=torch.int32) for of in (starts, sizes))
    batch, each = len(starts), starts.dim() == 4
    covered = slots_of(starts, sizes)
    keep = torch.zeros(batch * heads, capacity, dtype=torch.bool)
    for number, slots in enumerate(covered):
        keep[number // (group if each else 1), slots] = True
    query = make(generator, batch, heads, group, 48, dtype=dtype).to(device)
    caches = (make(generator, batch, heads, capacity, width, dtype=dtype) for width in (48, 64))
    key, value = (poison(cache, keep.view(batch, heads, -1)).to(device) for cache in caches)

    def slots(row, head, member):
        pair = row * heads + head
        return covered[pair * group + member if each else pair]

    handed = (sizes if given is None else torch.tensor(given, dtype=torch.int32)).to(device)
    out = attend_runs(query, key, value, starts.to(device), handed, scaling=0.15, backend=backend, **options)
    assert_close(out, attention(query, [tokens(key, value, slots)], scaling=0.15), dtype)
    return out


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("splits", [None, 1, 2])
def test_runs_in_any_order(device, backend, dtype, splits):
    starts = [[[100, 0, 60], [5, 249, 6]], [[7, 7, 7], [0, 0, 0]]]
    sizes = [[[70, 3, 1], [1, 1, 65]], [[0, 64, 0], [0, 0, 250]]]
    check(device, backend, starts, sizes, dtype=dtype, splits=splits)


@BOTH
def test_the_start_of_an_empty_run_is_not_looked_at(device, backend):
    out = check(device, backend, [[[2**30, 4], [-(2**30), 0]]], [[[0, 9], [0, 0]]])
    assert not out[0, 1].any()


@BOTH
def test_more_runs_than_a_tile_of_them(device, backend):
    starts = [[[3 * run for run in reversed(range(75))]]]
    sizes = [[[run % 4 for run in range(75)]]]
    check(device, backend, starts, sizes, heads=1, splits=2)


@BOTH
@pytest.mark.parametrize("splits", [None, 2])
def test_runs_beyond_the_count_are_not_looked_at(device, backend, splits):
    starts = [[[100, 0, 60], [5, 249, 6]], [[7, 7, 7], [3, 0, 0]]]
    sizes = [[[70, 3, 9], [1, 1, 65]], [[0, 64, 9], [8, 0, 9]]]
    counts = [[2, 1], [2, 0]]
    counted = [[[n if at < count else 0 for at, n in enumerate(of)] for of, count in zip(*row, strict=True)]
               for row in zip(sizes, counts, strict=True)]  # fmt: skip
    count = torch.tensor(counts, dtype=torch.int32, device=device)
    of_all = {"given": sizes, "count": count, "splits": splits}
    out = check(device, backend, starts, counted, **of_all)
    assert not out[1, 1].any()


@BOTH
def test_runs_of_each_query_head(device, backend):
    starts = [[[[0, 30], [40, 50], [200, 0]], [[9, 0], [0, 10], [0, 5]]]]
    sizes = [[[[20, 7], [1, 100], [50, 0]], [[2, 9], [10, 80], [5, 2]]]]
    check(device, backend, starts, sizes, most=110)


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="long rows take a GPU")


@on_a_gpu
@pytest.mark.parametrize("splits", [None, 1])
def test_rows_of_131072(device, splits):
    """A few long runs, and as many short ones as a selection of small clusters has."""
    clusters = list(range(131072 - 16, 0, -512))
    starts = [[[131000, 16, 100000], [3, 0, 0]], [clusters, [7 * at for at in range(len(clusters))]]]
    sizes = [[[72, 90000, 5], [131069, 3, 0]], [[at % 17 for at in range(len(clusters))], [7] * len(clusters)]]
    for row, sizes_of_row in zip(starts, sizes, strict=True):
        given = {"capacity": 131072, "dtype": torch.bfloat16, "splits": splits}
        check(device, "triton", [row], [sizes_of_row], **given)


@on_a_gpu
def test_more_groups_than_the_second_axis_of_a_grid_has(device):
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = (torch.randn(9000, 8, count, 16, generator=generator, device=device) for count in (2, 12, 12))
    starts = torch.randint(0, 6, (9000, 8, 1), generator=generator, device=device, dtype=torch.int32)
    out, expected = (
        attend_runs(query, key, value, starts, torch.full_like(starts, 5), scaling=0.2, backend=backend)
        for backend in ("triton", "reference")
    )
    assert_close(out, expected.double())


def test_sizes_are_those_of_the_starts():
    cache = torch.zeros(1, 1, 8, 16)
    runs = torch.zeros(1, 1, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"sizes: received torch.int32 \[1, 1, 2\], expected torch.int32 \[1, 1, 3\]"):
        attend_runs(cache[:, :, :1], cache, cache, runs, runs[..., :2], scaling=1.0)
