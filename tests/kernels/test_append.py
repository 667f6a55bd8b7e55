"""append: one slot of each sequence receives the token; nothing else changes."""

import pytest
import torch
from compiling import compiled
from paged_problem import Paged, pages_of
from tolerances import assert_close

from kvcal.kernels.append import append
from kvcal.kernels.pages import PAGE
from kvcal.kernels.score import score

CAPACITY = 9
BOTH = pytest.mark.parametrize("backend", ["triton", "reference"])


class Cache:
    """Keys and values filled with what must remain: NaN."""

    def __init__(self, dtype, head_dim=64, value_dim=64, batch=3, heads=2, device="cpu"):
        def nan(width):
            return torch.full((batch, heads, CAPACITY, width), torch.nan, dtype=dtype, device=device)

        self.key, self.value = nan(head_dim), nan(value_dim)

    def append(self, key_new, value_new, lengths, backend="triton"):
        lengths = torch.tensor(lengths, dtype=torch.int32, device=self.key.device)
        append(key_new, value_new, self.key, self.value, lengths, backend=backend)

    def assert_untouched(self, but=()):
        for tensor in (self.key, self.value):
            kept = torch.ones(tensor.shape[0], CAPACITY, dtype=torch.bool, device=tensor.device)
            for sequence, slot in but:
                kept[sequence, slot] = False
            assert tensor.transpose(1, 2)[kept].isnan().all()

    def assert_holds(self, sequence, slot, key, value):
        """
        Args:
            key: [Hkv, D] and value as stored.
        """
        assert torch.equal(self.key[sequence, :, slot], key) and torch.equal(self.value[sequence, :, slot], value)


def draw(dtype, head_dim, value_dim, device, batch=3, heads=2):
    generator = torch.Generator().manual_seed(head_dim + value_dim)
    key_new = torch.randn(batch, heads, head_dim, generator=generator).to(dtype)
    value_new = torch.randn(batch, heads, value_dim, generator=generator).to(dtype)
    return key_new.to(device), value_new.to(device)


@BOTH
@pytest.mark.parametrize(
    ("dtype", "head_dim", "value_dim"),
    [
        (torch.float32, 64, 64),
        (torch.bfloat16, 80, 80),
        (torch.float16, 96, 64),
        (torch.bfloat16, 128, 128),
        (torch.float16, 256, 256),
    ],
)
def test_a_token_and_nothing_else(device, backend, dtype, head_dim, value_dim):
    key_new, value_new = draw(dtype, head_dim, value_dim, device)
    cache = Cache(dtype, head_dim, value_dim, device=device)
    slots = [0, 4, CAPACITY - 1]
    cache.append(key_new, value_new, slots, backend=backend)
    for sequence, slot in enumerate(slots):
        cache.assert_holds(sequence, slot, key_new[sequence], value_new[sequence])
    cache.assert_untouched(but=list(enumerate(slots)))


@BOTH
@pytest.mark.parametrize("left", [CAPACITY, -1], ids=["full", "padding"])
def test_full_sequences_and_padding_are_left_alone(device, backend, left):
    key_new, value_new = draw(torch.float16, 64, 64, device)
    cache = Cache(torch.float16, device=device)
    cache.append(key_new, value_new, [left, 2, left], backend=backend)
    cache.assert_holds(1, 2, key_new[1], value_new[1])
    cache.assert_untouched(but=[(1, 2)])


@BOTH
def test_caches_may_be_parts_of_larger_tensors(device, backend):
    """Sequences of a larger buffer, and new tokens that are slices of the fused projection's output."""
    key_new, value_new = draw(torch.bfloat16, 64, 64, device)
    fused = torch.cat((key_new, value_new), -1)
    cache = Cache(torch.bfloat16, batch=4, device=device)
    lengths = torch.tensor([5, 0, 8], dtype=torch.int32, device=device)
    append(fused[..., :64], fused[..., 64:], cache.key[1:], cache.value[1:], lengths, backend=backend)
    for sequence, slot in enumerate(lengths.tolist()):
        cache.assert_holds(sequence + 1, slot, key_new[sequence], value_new[sequence])
    cache.assert_untouched(but=[(1, 5), (2, 0), (3, 8)])


@BOTH
def test_strides_over_tokens_and_heads_are_the_caches_own(device, backend):
    """Buffers in which heads come first, keys and values lie interleaved, and what is between must remain."""
    key_new, value_new = draw(torch.float16, 64, 48, device)
    buffer = torch.full((2, 3, CAPACITY, 3, 64), torch.nan, dtype=torch.float16, device=device)
    key, value = buffer[..., 0, :].transpose(0, 1), buffer[..., 1, :48].transpose(0, 1)
    lengths = torch.tensor([7, CAPACITY, 1], dtype=torch.int32, device=device)
    append(key_new, value_new, key, value, lengths, backend=backend)
    expected = torch.full_like(buffer, torch.nan)
    for sequence, slot in ((0, 7), (2, 1)):
        expected[:, sequence, slot, 0], expected[:, sequence, slot, 1, :48] = key_new[sequence], value_new[sequence]
    assert torch.equal(buffer.nan_to_num(-7.0), expected.nan_to_num(-7.0))


@BOTH
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("table_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize(
    ("dtype", "head_dim", "value_dim"),
    [(torch.float32, 64, 64), (torch.bfloat16, 80, 80), (torch.float16, 96, 64)],
    ids=["fp32", "bf16", "fp16, unequal widths"],
)
def test_a_token_by_page_and_nothing_else(device, backend, heads_first, table_dtype, dtype, head_dim, value_dim):
    """Sequences at the start, the end and the middle of a page, padding, full ones, and ones of a page of their own."""
    slots, pages = [-1, 0, PAGE - 1, PAGE, 3 * PAGE - 30, 3 * PAGE, 3 * PAGE - 1, -1], 3
    key_new, value_new = draw(dtype, head_dim, value_dim, device, batch=len(slots))
    caches = {"key": torch.full((len(slots), 2, pages * PAGE, head_dim), torch.nan, dtype=dtype, device=device)}
    caches["value"] = caches["key"].new_full((len(slots), 2, pages * PAGE, value_dim), torch.nan)
    paged = Paged(caches, pages_of([slot + 1 for slot in slots], pages), table_dtype, heads_first)
    assert paged.layout.alternating == (head_dim == value_dim)
    expected = paged.pieces.clone()
    parts = paged.layout.parts_of(expected)
    for sequence, slot in enumerate(slots):
        if 0 <= slot < pages * PAGE:
            page = int(paged.table[sequence, slot // PAGE])
            parts["key"][page, :, slot % PAGE] = key_new[sequence]
            parts["value"][page, :, slot % PAGE] = value_new[sequence]
    lengths = torch.tensor(slots, dtype=torch.int32, device=device)
    append(key_new, value_new, paged.key, paged.value, lengths, table=paged.table, backend=backend)
    assert torch.equal(paged.pieces, expected)


@BOTH
def test_where_no_sequence_has_room_no_page_changes(device, backend):
    key_new, value_new = draw(torch.float32, 64, 64, device)
    caches = {name: torch.zeros(3, 2, 2 * PAGE, 64, device=device) for name in ("key", "value")}
    paged = Paged(caches, pages_of([0, 2 * PAGE, 0], 2))
    expected = paged.pieces.clone()
    lengths = torch.tensor([-1, 2 * PAGE, -1], dtype=torch.int32, device=device)
    append(key_new, value_new, paged.key, paged.value, lengths, table=paged.table, backend=backend)
    assert torch.equal(paged.pieces, expected)


def test_score_reads_what_append_wrote(device):
    cache = Cache(torch.float32, device=device)
    key_new, value_new = draw(torch.float32, 64, 64, device)
    cache.append(key_new, value_new, [0, 0, 0])
    lengths = torch.ones(3, dtype=torch.int32, device=device)
    query = torch.randn(3, 2, 4, 32, generator=torch.Generator().manual_seed(0)).to(device)
    scores = score(query, cache.key[..., :32], lengths, scaling=1.0, backend="triton")[..., 0]
    assert_close(scores, torch.einsum("bhgr,bhr->bhg", query.double(), key_new[..., :32].double()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key_new": torch.zeros(3, 2, 63)}, r"key: received \[3, 2, 63\] for a cache \[3, 2, 9, 64\]"),
        ({"value_new": torch.zeros(2, 2, 64)}, r"value: received \[2, 2, 64\]"),
        ({"value": torch.zeros(3, 2, 8, 64)}, r"value: received \[3, 2, 8, 64\], expected \[3, 2, 9\] before its last"),
        ({"key": torch.zeros(3, 2, 9, 128)[..., ::2]}, "key: expected the numbers of one token to be contiguous"),
        ({"lengths": torch.zeros(3).long()}, "lengths: received torch.int64"),
        (
            {"table": torch.zeros(3, 1).int()},
            r"key: received .* a cache \[3, 2, 9, 64\] .*, expected .* \[N, Hkv, 64, D\]",
        ),
        (
            {"table": torch.zeros(2, 1).int(), "key": torch.zeros(5, 2, 64, 64), "value": torch.zeros(5, 2, 64, 64)},
            r"table: received torch.int32 \[2, 1\] on cpu, expected int32 or int64 \[3, P\] on cpu",
        ),
    ],
)
def test_bad_arguments_are_named(changes, message):
    cache, (key_new, value_new) = Cache(torch.float32), draw(torch.float32, 64, 64, "cpu")
    arguments = {"key_new": key_new, "value_new": value_new, "key": cache.key, "value": cache.value}
    with pytest.raises(ValueError, match=message):
        append(**arguments | {"lengths": torch.zeros(3, dtype=torch.int32)} | changes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="long sequences take a GPU")
def test_sequences_of_131072_whose_offsets_have_more_than_32_bits(device, monkeypatch):
    monkeypatch.setitem(globals(), "CAPACITY", 131072)
    heads, batch = 8, 17
    cache = Cache(torch.bfloat16, 128, 128, batch, heads, device)
    key_new, value_new = draw(torch.bfloat16, 128, 128, device, batch, heads)
    slots = [131071 - 7001 * sequence for sequence in range(batch)]
    cache.append(key_new, value_new, slots)
    for sequence, slot in enumerate(slots):
        cache.assert_holds(sequence, slot, key_new[sequence], value_new[sequence])
    cache.assert_untouched(but=list(enumerate(slots)))


def test_compiles_for_hopper_without_spilling_and_once_for_all_capacities():
    pytest.importorskip("triton")
    launches = compiled("""
import torch
from kvcal.kernels.append import append
def launch(capacity, head_dim):
    new, cache = torch.zeros(2, 8, head_dim).half(), torch.zeros(2, 8, capacity, head_dim).half()
    append(new, new, cache, cache, torch.zeros(2, dtype=torch.int32), backend="triton")
for capacity in (1, 1000, 4096):
    launch(capacity, 128)
launch(64, 256)
launch(64, 80)
""")
    assert not any(launch["stack"] for launch in launches), launches
    assert len({launch["hash"] for launch in launches[:3]}) == 1


def test_by_page_compiles_for_hopper_without_spilling_and_once_for_all_tables():
    pytest.importorskip("triton")
    launches = compiled("""
import torch
from kvcal.kernels.append import append
from kvcal.kernels.pages import PageLayout, Part
def launch(count, pages, head_dim, value_dim=None):
    layout = PageLayout({"key": Part(head_dim, torch.half), "value": Part(value_dim or head_dim, torch.half)})
    parts = layout.parts_of(torch.zeros(count, 8, layout.nbytes, dtype=torch.uint8))
    key_new, value_new = (parts[name][:2, :, 0].contiguous() for name in ("key", "value"))
    table = torch.zeros(2, pages + 1, dtype=torch.int32)[:, 1:]
    append(key_new, value_new, *parts.values(), torch.zeros(2, dtype=torch.int32), table=table, backend="triton")
for count, pages in ((2, 1), (50, 16), (77, 1001)):
    launch(count, pages, 128)
launch(9, 4, 256)
launch(9, 4, 96, 64)
""")
    assert not any(launch["stack"] for launch in launches), launches
    assert len({launch["hash"] for launch in launches[:3]}) == 1
