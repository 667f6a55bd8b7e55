"""Pages: parts share a piece without touching one another, and a block table puts them in order."""

import pytest
import torch

from kvcal.kernels.pages import ALIGNED, PAGE, PageLayout, Part, in_rows, ordered, page_strides, rows_of
from kvcal.kernels.pages.table import capacity_of, check_table, within

BF16, FP16, FP32, BYTE = torch.bfloat16, torch.float16, torch.float32, torch.uint8
LAYOUTS = {
    "alternating": {"key": Part(128, BF16), "value": Part(128, BF16), "reduced": Part(32, BF16)},
    "unequal widths": {"key": Part(96, FP16), "value": Part(64, FP16), "scale": Part(1, FP16)},
    "unequal dtypes": {"key": Part(64, BYTE), "value": Part(64, FP16)},
    "odd": {"codeword": Part(1, BYTE), "key": Part(80, FP32), "value": Part(80, FP32), "code": Part(12, BYTE)},
    "of pages": {
        "code": Part(20, BYTE), "scale": Part(1, FP16), "key": Part(48, BYTE), "value": Part(48, BYTE),
        "correction": Part(48, BYTE, of_page=True), "correction_scale": Part(1, FP16, of_page=True),
    },
}  # fmt: skip
EVERY = pytest.mark.parametrize("parts", LAYOUTS.values(), ids=LAYOUTS)
HEADS_FIRST = pytest.mark.parametrize("heads_first", [False, True])


def pieces_of(layout, count=3, heads=2, heads_first=False):
    order = (heads, count) if heads_first else (count, heads)
    pieces = torch.zeros(*order, layout.nbytes, dtype=BYTE)
    return pieces.transpose(0, 1) if heads_first else pieces


def as_bytes(part):
    """A view of the bytes of every number."""
    strides = tuple(stride * part.itemsize for stride in part.stride()[:3])
    whole = torch.empty(0, dtype=BYTE).set_(part.untyped_storage())
    shape = (*part.shape[:3], part.shape[3] * part.itemsize)
    return whole.as_strided(shape, (*strides, 1), part.storage_offset() * part.itemsize)


@EVERY
@HEADS_FIRST
def test_no_two_parts_overlap(parts, heads_first):
    layout = PageLayout(parts)
    pieces = pieces_of(layout, heads_first=heads_first)
    views = layout.parts_of(pieces)
    generator = torch.Generator().manual_seed(0)
    written = {}
    for name, view in views.items():
        assert view.shape == (3, 2, 1 if parts[name].of_page else PAGE, parts[name].width)
        assert view.dtype == parts[name].dtype and view.data_ptr() % view.itemsize == 0
        written[name] = torch.randint(1, 256, as_bytes(view).shape, generator=generator, dtype=BYTE)
        as_bytes(view).copy_(written[name])
    for name, view in views.items():
        assert torch.equal(as_bytes(view), written[name]), name
    assert pieces.count_nonzero() == sum(each.numel() for each in written.values())  # each byte has one place


@EVERY
def test_from_page_to_page_there_are_whole_rows_of_every_part(parts):
    layout = PageLayout(parts)
    assert all(layout.nbytes % part.nbytes == 0 for part in parts.values())
    assert layout.nbytes % PAGE == 0 and layout.nbytes % layout.unit == 0
    kept = sum(part.nbytes * (1 if part.of_page else PAGE) for part in parts.values())
    assert kept <= layout.nbytes


@EVERY
def test_parts_begin_where_lines_do(parts):
    layout = PageLayout(parts)
    pieces = pieces_of(layout)
    for name, view in layout.parts_of(pieces).items():
        start = view.data_ptr() - pieces.data_ptr()
        assert start % ALIGNED == 0 or (name == "value" and layout.alternating), name


def test_equally_wide_keys_and_values_alternate():
    layout = PageLayout(LAYOUTS["alternating"])
    views = layout.parts_of(pieces_of(layout))
    assert layout.alternating and views["key"].stride(2) == views["value"].stride(2) == 256
    assert views["value"].data_ptr() - views["key"].data_ptr() == 256
    assert not PageLayout(LAYOUTS["unequal widths"]).alternating
    assert not PageLayout(LAYOUTS["unequal dtypes"]).alternating


@HEADS_FIRST
def test_a_table_puts_tokens_in_order(heads_first):
    layout = PageLayout(LAYOUTS["of pages"])
    views = layout.parts_of(pieces_of(layout, 5, heads_first=heads_first))
    table = torch.tensor([[3, 0], [4, 1]], dtype=torch.int32)
    for name in ("key", "correction"):
        view = views[name]
        view.copy_(torch.randint(0, 256, view.shape, generator=torch.Generator().manual_seed(1), dtype=BYTE))
        found, rows = ordered(view, table), view.shape[2]
        assert found.shape == (2, 2, 2 * rows, 48)
        for sequence, page in ((0, 0), (0, 1), (1, 0), (1, 1)):
            assert torch.equal(found[sequence, :, page * rows : (page + 1) * rows], view[table[sequence, page]])
        assert ordered(view, None) is view
    assert capacity_of(views["key"], table) == 2 * PAGE and capacity_of(found, None) == 2


def test_strides_of_parts_that_share_pieces():
    layout = PageLayout(LAYOUTS["odd"])
    piece = layout.nbytes // ALIGNED
    views = layout.parts_of(pieces_of(layout))
    assert page_strides([*views.values()]) == (2 * piece, piece)
    by_head = layout.parts_of(pieces_of(layout, heads_first=True))
    assert page_strides([*by_head.values()]) == (piece, 3 * piece)
    assert page_strides([views["key"], by_head["value"]]) is None
    assert page_strides([views["key"], views["value"][..., ::2]]) is None


@EVERY
@HEADS_FIRST
def test_parts_are_whole_rows_of_memory(parts, heads_first):
    layout = PageLayout(parts)
    for view in layout.parts_of(pieces_of(layout, heads_first=heads_first)).values():
        assert in_rows(view) and (view.shape[3] == 1 or not in_rows(view[..., ::2]))
        as_bytes(view).copy_(torch.randint(0, 64, as_bytes(view).shape, dtype=BYTE))
        rows, steps = rows_of(view)
        for place in ((0, 0, 0), (2, 1, view.shape[2] - 1), (1, 0, view.shape[2] // 2)):
            found = rows[sum(at * step for at, step in zip(place, steps, strict=True))]
            assert torch.equal(found, view[place]), place


def test_garbage_beyond_a_sequence_is_masked():
    table = torch.tensor([[7, -1, 2**31 - 1], [7, 8, -1], [7, 8, 9], [-1, -1, -1]], dtype=torch.int32)
    lengths = torch.tensor([PAGE, PAGE + 1, 3 * PAGE, -1], dtype=torch.int32)
    assert within(table, lengths).tolist() == [[7, 0, 0], [7, 8, 0], [7, 8, 9], [0, 0, 0]]
    assert within(None, lengths) is None


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.zeros(2, 3), r"table: received torch.float32 \[2, 3\] on cpu, expected int32 or int64 \[2, P\] on cpu"),
        (torch.zeros(3, 3).int(), r"table: received torch.int32 \[3, 3\]"),
        (torch.zeros(2).long(), r"table: received torch.int64 \[2\]"),
        (torch.zeros(3, 2).int().T, "table: received stride 2 over the pages of a sequence, expected 1"),
    ],
)
def test_tables_that_do_not_fit_are_named(table, message):
    with pytest.raises(ValueError, match=message):
        check_table(table, 2, torch.device("cpu"))
