"""append: one slot of each row receives the token and its entry of the index; nothing else changes."""

import pytest
import torch
from compiling import compiled
from tolerances import assert_close

from kvcal.kernels.append import append
from kvcal.kernels.score import score

CAPACITY = 9


class Cache:
    """Tensors of every store filled with what must remain: NaN."""

    def __init__(self, dtype, rank, head_dim=64, value_dim=64, batch=3, heads=2, device="cpu"):
        """
        Args:
            rank: None: there is no index.
        """

        def nan(width):
            return torch.full((batch, heads, CAPACITY, width), torch.nan, dtype=dtype, device=device)

        self.key, self.value = nan(head_dim), nan(value_dim)
        self.index = None if rank is None else nan(rank)

    def append(self, key_new, value_new, map, lengths, active=None, backend="triton"):
        lengths = torch.tensor(lengths, dtype=torch.int32, device=self.key.device)
        active = None if active is None else torch.tensor(active, device=self.key.device)
        append(key_new, value_new, map, *self.tensors(), lengths, active, backend=backend)

    def tensors(self):
        return self.key, self.value, self.index

    def assert_untouched(self, but=()):
        for tensor in self.tensors():
            if tensor is not None:
                kept = torch.ones(tensor.shape[0], CAPACITY, dtype=torch.bool, device=tensor.device)
                for row, slot in but:
                    kept[row, slot] = False
                assert tensor.transpose(1, 2)[kept].isnan().all()

    def assert_holds(self, row, slot, key, value, projected):
        """
        Args:
            key: [Hkv, D] and value as stored.
            projected: [Hkv, r] float64.
        """
        assert torch.equal(self.key[row, :, slot], key) and torch.equal(self.value[row, :, slot], value)
        assert_close(self.index[row, :, slot], projected)


def draw(dtype, head_dim, value_dim, rank, device, batch=3, heads=2):
    generator = torch.Generator().manual_seed(head_dim + rank)
    key_new = torch.randn(batch, heads, head_dim, generator=generator).to(dtype)
    value_new = torch.randn(batch, heads, value_dim, generator=generator).to(dtype)
    map = (torch.randn(heads, rank, head_dim, generator=generator) / head_dim**0.5).to(dtype)
    return key_new.to(device), value_new.to(device), map.to(device)


def product(map, key_new):
    return torch.einsum("hrd,bhd->bhr", map.double().cpu(), key_new.double().cpu())


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "first dimensions"])
@pytest.mark.parametrize(
    ("dtype", "head_dim", "value_dim", "rank"),
    [
        (torch.float32, 64, 64, 32),
        (torch.bfloat16, 80, 80, 24),
        (torch.float16, 96, 64, 20),
        (torch.bfloat16, 128, 128, 128),
        (torch.float16, 256, 256, 64),
    ],
)
def test_a_token_and_its_entry(device, backend, mapped, dtype, head_dim, value_dim, rank):
    key_new, value_new, map = draw(dtype, head_dim, value_dim, rank, device)
    cache = Cache(dtype, rank, head_dim, value_dim, device=device)
    slots = [0, 4, CAPACITY - 1]
    cache.append(key_new, value_new, map if mapped else None, slots, backend=backend)
    projected = product(map, key_new) if mapped else key_new.double().cpu()[..., :rank]
    for row, slot in enumerate(slots):
        cache.assert_holds(row, slot, key_new[row], value_new[row], projected[row])
    cache.assert_untouched(but=list(enumerate(slots)))


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("rank", [None, 32])
def test_inactive_and_full_rows_are_left_alone(device, backend, rank):
    key_new, value_new, map = draw(torch.float16, 64, 64, 32, device)
    cache = Cache(torch.float16, rank, device=device)
    cache.append(key_new, value_new, map, [2, 2, CAPACITY], active=[False, True, True], backend=backend)
    cache.assert_untouched(but=[(1, 2)])
    assert torch.equal(cache.key[1, :, 2], key_new[1]) and torch.equal(cache.value[1, :, 2], value_new[1])


def test_caches_may_be_parts_of_larger_tensors(device):
    """Rows of a larger buffer, and new tokens that are slices of the fused projection's output."""
    key_new, value_new, map = draw(torch.bfloat16, 64, 64, 32, device)
    fused = torch.cat((key_new, value_new), -1)
    cache = Cache(torch.bfloat16, 32, batch=4, device=device)
    lengths = torch.tensor([5, 0, 8], dtype=torch.int32, device=device)
    parts = [tensor[1:] for tensor in cache.tensors()]
    append(fused[..., :64], fused[..., 64:], map, *parts, lengths, backend="triton")
    projected = product(map, key_new)
    for row, slot in enumerate(lengths.tolist()):
        cache.assert_holds(row + 1, slot, key_new[row], value_new[row], projected[row])
    cache.assert_untouched(but=[(1, 5), (2, 0), (3, 8)])


def test_score_reads_what_append_wrote(device):
    cache = Cache(torch.float32, 32, device=device)
    key_new, value_new, map = draw(torch.float32, 64, 64, 32, device)
    cache.append(key_new, value_new, map, [0, 0, 0])
    lengths = torch.ones(3, dtype=torch.int32, device=device)
    query = torch.randn(3, 2, 4, 32, generator=torch.Generator().manual_seed(0)).to(device)
    scores = score(query, cache.index, lengths, scaling=1.0, backend="triton")[..., 0]
    assert_close(scores, torch.einsum("bhgr,bhr->bhg", query.double().cpu(), product(map, key_new)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key_new": torch.zeros(3, 2, 63)}, r"key: received \[3, 2, 63\] for a cache \[3, 2, 9, 64\]"),
        ({"value_new": torch.zeros(2, 2, 64)}, r"value: received \[2, 2, 64\]"),
        ({"lengths": torch.zeros(3).long()}, "lengths: received torch.int64"),
        ({"active": torch.zeros(3)}, "active: received torch.float32"),
        ({"map": torch.zeros(2, 31, 64)}, r"map: received \[2, 31, 64\], expected contiguous \[2, 32, 64\]"),
        ({"index": torch.zeros(3, 2, 9, 32).long()}, "index: received torch.int64, expected a float dtype"),
        ({"index": torch.zeros(3, 2, 8, 32)}, r"index: received \[3, 2, 8, 32\]"),
        ({"index": torch.zeros(3, 2, 9, 65), "map": None}, "index: received rank 65 without a map"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    cache = Cache(torch.float32, 32)
    key_new, value_new, map = draw(torch.float32, 64, 64, 32, "cpu")
    names = ("key_new", "value_new", "map", "key", "value", "index", "lengths")
    lengths = torch.zeros(3, dtype=torch.int32)
    arguments = dict(zip(names, (key_new, value_new, map, *cache.tensors(), lengths), strict=True))
    with pytest.raises(ValueError, match=message):
        append(**arguments | changes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="long rows take a GPU")
def test_rows_of_131072_whose_offsets_have_more_than_32_bits(device, monkeypatch):
    monkeypatch.setitem(globals(), "CAPACITY", 131072)
    heads, batch, rank = 8, 17, 64
    cache = Cache(torch.bfloat16, rank, 128, 128, batch, heads, device)
    key_new, value_new, map = draw(torch.bfloat16, 128, 128, rank, device, batch, heads)
    slots = [131071 - 7001 * row for row in range(batch)]
    cache.append(key_new, value_new, map, slots)
    projected = product(map, key_new)
    for row, slot in enumerate(slots):
        cache.assert_holds(row, slot, key_new[row], value_new[row], projected[row])
    cache.assert_untouched(but=list(enumerate(slots)))


def test_compiles_for_hopper_without_spilling_and_once_for_all_capacities():
    pytest.importorskip("triton")
    launches = compiled("""
import torch
from kvcal.kernels.append import append
def launch(capacity, head_dim, rank):
    new, cache = torch.zeros(2, 8, head_dim).half(), torch.zeros(2, 8, capacity, head_dim).half()
    index, map = torch.zeros(2, 8, capacity, rank).half(), new.new_zeros(8, rank, head_dim)
    append(new, new, map, cache, cache, index, torch.zeros(2, dtype=torch.int32), backend="triton")
for capacity in (1, 1000, 4096):
    launch(capacity, 128, 32)
launch(64, 256, 128)
launch(64, 80, 48)
""")
    assert all(launch["stack"] <= 16 for launch in launches), launches
    assert len({launch["hash"] for launch in launches[:3]}) == 1
