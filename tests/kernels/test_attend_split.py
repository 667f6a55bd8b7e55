"""`split` cuts every unit's tokens into parts of equal length, in no more slots than the grid has."""

import pytest
import torch

from kvcal.kernels.attend.shapes import choose_splits

triton = pytest.importorskip("triton")
tl = triton.language
split = pytest.importorskip("kvcal.kernels.attend.split")
part_of_program, parts_of_unit = split.part_of_program, split.parts_of_unit
TOKEN_TILE = 64


@triton.jit(do_not_specialize=["units", "most", "splits"])
def deal(parts_ptr, slots_ptr, counts_ptr, units, most, splits, UNITS: tl.constexpr, TOKEN_TILE: tl.constexpr):
    program = tl.program_id(0)
    unit, begin, end = part_of_program(counts_ptr, program, units, most, splits, UNITS, TOKEN_TILE)
    tl.store(parts_ptr + program * 3, unit)
    tl.store(parts_ptr + program * 3 + 1, begin)
    tl.store(parts_ptr + program * 3 + 2, end)
    if program < units:
        first, parts = parts_of_unit(counts_ptr, program, units, most, splits, UNITS, TOKEN_TILE)
        tl.store(slots_ptr + program * 2, first)
        tl.store(slots_ptr + program * 2 + 1, parts)


@pytest.mark.parametrize("splits", [1, 5])
@pytest.mark.parametrize(
    "counts",
    [[1], [1000], [0], [0, 0, 0], [1000, 1, 1], [0, 1000, 64, 65, 0], [640] * 4, [1] * 9, [5, -3, 4000]],
    ids=str,
)
def test_every_token_is_dealt_once_and_no_part_is_longer_than_its_share(device, counts, splits):
    units, most = len(counts), 1000
    slots = units * splits + units - 1
    parts, where = (
        torch.full((rows, wide), -7, dtype=torch.int32, device=device) for rows, wide in ((slots, 3), (units, 2))
    )
    given = torch.tensor(counts, dtype=torch.int32, device=device)
    deal[(slots,)](parts, where, given, units, most, splits, UNITS=16, TOKEN_TILE=TOKEN_TILE)
    counts = [min(max(count, 0), most) for count in counts]
    share = -(-sum(counts) // (units * splits * TOKEN_TILE)) * TOKEN_TILE or TOKEN_TILE
    dealt = [(unit, begin, end) for unit, begin, end in parts.tolist() if unit < units]
    wanted = [
        (unit, begin, min(begin + share, count))
        for unit, count in enumerate(counts)
        for begin in range(0, count, share)
    ]
    assert dealt == wanted
    for unit, (first, number) in enumerate(where.tolist()):
        assert [slot for slot, part in enumerate(dealt) if part[0] == unit] == list(range(first, first + number))


@pytest.mark.parametrize(
    ("groups", "most", "smallest", "splits"),
    [
        (8, 131072, 256, 132),  # one sequence of Llama 3 8B: eight programs a multiprocessor
        (64, 131072, 256, 17),
        (8, 8192, 256, 33),  # two programs a multiprocessor, though each has four tiles only
        (8, 2048, 128, 32),  # a tile each
        (64, 2048, 128, 16),
        (4096, 2048, 128, 1),
        (1, 1, 128, 1),
    ],
)
def test_splits_follow_from_shapes(groups, most, smallest, splits):
    assert choose_splits(groups, most, smallest, torch.device("cpu")) == splits
