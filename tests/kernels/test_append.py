"""append: one slot of each row receives the token and its code; nothing else changes."""

import pytest
import torch
from compiling import compiled
from tolerances import assert_close

from kvcal.kernels.append import append
from kvcal.kernels.score import score, unpack

CAPACITY = 9
LARGEST = {8: 127, 4: 7, 2: 1.5}
DTYPES = {8: torch.int8, 4: torch.uint8, 2: torch.uint8}
UNTOUCHED = 77


class Cache:
    """Tensors of every store filled with what must remain: NaN, or 77 in integers."""

    def __init__(self, bits, dtype, rank, head_dim=64, value_dim=64, batch=3, heads=2, device="cpu"):
        def full(*shape, dtype):
            return torch.full(shape, UNTOUCHED if dtype in DTYPES.values() else torch.nan, dtype=dtype, device=device)

        rows = (batch, heads, CAPACITY)
        self.key, self.value = full(*rows, head_dim, dtype=dtype), full(*rows, value_dim, dtype=dtype)
        self.codes = self.scales = None
        if bits is not None:
            self.codes = full(*rows, rank * bits // 8 if bits < 8 else rank, dtype=DTYPES.get(bits, dtype))
        if bits in DTYPES:
            self.scales = full(*rows, dtype=torch.float16)
        self.bits = bits

    def append(self, key_new, value_new, map, lengths, active=None, backend="triton", **options):
        lengths = torch.tensor(lengths, dtype=torch.int32, device=self.key.device)
        active = None if active is None else torch.tensor(active, device=self.key.device)
        append(
            key_new, value_new, map, *self.tensors(), lengths, active, bits=self.bits or 16, backend=backend, **options
        )

    def tensors(self):
        return self.key, self.value, self.codes, self.scales

    def assert_untouched(self, but=()):
        for tensor in self.tensors():
            if tensor is not None:
                kept = torch.ones(tensor.shape[0], CAPACITY, dtype=torch.bool, device=tensor.device)
                for row, slot in but:
                    kept[row, slot] = False
                rest = tensor.transpose(1, 2)[kept]
                assert (rest.isnan() if tensor.is_floating_point() else rest == UNTOUCHED).all()

    def assert_holds(self, row, slot, key, value, projected, clip=1.0):
        """Args: key: [Hkv, D] and value as stored; projected: [Hkv, r] float64."""
        assert torch.equal(self.key[row, :, slot], key) and torch.equal(self.value[row, :, slot], value)
        if self.bits == 16:
            assert_close(self.codes[row, :, slot], projected)
        elif self.bits is not None:
            scales = self.scales[row, :, slot].double().cpu()
            exact = projected.abs().amax(-1) * clip / LARGEST[self.bits]
            torch.testing.assert_close(scales, exact, rtol=2**-10, atol=0)
            numbers = unpack(self.codes[row, :, slot], self.bits).double().cpu() * scales.unsqueeze(-1)
            step = scales.unsqueeze(-1) * (0.5 + LARGEST[self.bits] * 2**-11)
            bound = (exact * LARGEST[self.bits]).unsqueeze(-1)
            projected = projected.clamp(-bound, bound)
            assert ((numbers - projected).abs() <= step * (1 + 1e-4)).all()


def draw(dtype, head_dim, value_dim, rank, device, batch=3, heads=2):
    generator = torch.Generator().manual_seed(head_dim + rank)
    key_new = torch.randn(batch, heads, head_dim, generator=generator).to(dtype)
    value_new = torch.randn(batch, heads, value_dim, generator=generator).to(dtype)
    map = (torch.randn(heads, rank, head_dim, generator=generator) / head_dim**0.5).to(dtype)
    return key_new.to(device), value_new.to(device), map.to(device)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "first dimensions"])
@pytest.mark.parametrize("bits", [16, 8, 4, 2])
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
def test_a_token_and_its_code(device, backend, mapped, bits, dtype, head_dim, value_dim, rank):
    key_new, value_new, map = draw(dtype, head_dim, value_dim, rank, device)
    cache = Cache(bits, dtype, rank, head_dim, value_dim, device=device)
    slots = [0, 4, CAPACITY - 1]
    cache.append(key_new, value_new, map if mapped else None, slots, backend=backend)
    projected = key_new.double().cpu()[..., :rank]
    if mapped:
        projected = torch.einsum("hrd,bhd->bhr", map.double().cpu(), key_new.double().cpu())
    for row, slot in enumerate(slots):
        cache.assert_holds(row, slot, key_new[row], value_new[row], projected[row])
    cache.assert_untouched(but=list(enumerate(slots)))


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_clip_of_the_scale(device, backend, bits):
    key_new, value_new, map = draw(torch.float32, 64, 64, 48, device)
    cache = Cache(bits, torch.float32, 48, device=device)
    cache.append(key_new, value_new, map, [3, 3, 3], backend=backend, clip=0.55)
    projected = torch.einsum("hrd,bhd->bhr", map.double().cpu(), key_new.double().cpu())
    for row in range(3):
        cache.assert_holds(row, 3, key_new[row], value_new[row], projected[row], clip=0.55)
    cache.assert_untouched(but=[(row, 3) for row in range(3)])


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "first dimensions"])
@pytest.mark.parametrize("bits", [16, 8, 4, 2])
def test_an_offset_is_taken_off_after_the_projection(device, backend, mapped, bits):
    key_new, value_new, map = draw(torch.bfloat16, 80, 80, 40, device)
    offset = 3 * torch.randn(2, 40, generator=torch.Generator().manual_seed(2)).to(device)
    cache = Cache(bits, torch.bfloat16, 40, 80, 80, device=device)
    cache.append(key_new, value_new, map if mapped else None, [0, 5, 8], backend=backend, offset=offset)
    projected = key_new.double().cpu()[..., :40]
    if mapped:
        projected = torch.einsum("hrd,bhd->bhr", map.double().cpu(), key_new.double().cpu())
    for row, slot in enumerate([0, 5, 8]):
        cache.assert_holds(row, slot, key_new[row], value_new[row], projected[row] - offset.double().cpu())
    cache.assert_untouched(but=[(0, 0), (1, 5), (2, 8)])


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("value_dim", [64, 80])
def test_values_are_summed_from_a_slot_on(device, backend, value_dim):
    """Not of rows below it, nor of those that are full or not active."""
    key_new, value_new, _ = draw(torch.float16, 64, value_dim, 32, device, batch=4)
    cache = Cache(None, torch.float16, 32, 64, value_dim, batch=4, device=device)
    before = torch.randn(4, 2, value_dim, generator=torch.Generator().manual_seed(1)).to(device)
    total = before.clone()
    active = [True, True, False, True]
    cache.append(key_new, value_new, None, [3, 4, 5, CAPACITY], active, backend=backend, value_sum=total, summed_from=4)
    assert_close(total[1], before[1].double() + value_new[1].double())
    assert torch.equal(total[[0, 2, 3]], before[[0, 2, 3]])


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("bits", [None, 16, 8, 4])
def test_inactive_and_full_rows_are_left_alone(device, backend, bits):
    key_new, value_new, map = draw(torch.float16, 64, 64, 32, device)
    cache = Cache(bits, torch.float16, 32, device=device)
    cache.append(key_new, value_new, map, [2, 2, CAPACITY], active=[False, True, True], backend=backend)
    cache.assert_untouched(but=[(1, 2)])
    assert torch.equal(cache.key[1, :, 2], key_new[1]) and torch.equal(cache.value[1, :, 2], value_new[1])


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_key_of_zeros_stays_zero(device, backend, bits):
    key_new, value_new, map = draw(torch.float32, 64, 64, 32, device)
    cache = Cache(bits, torch.float32, 32, device=device)
    cache.append(key_new * 0, value_new, map, [1, 1, 1], backend=backend)
    assert not cache.scales[:, :, 1].any() and (bits == 2 or not unpack(cache.codes[:, :, 1], bits).any())


@pytest.mark.parametrize("bits", [16, 8, 4, 2])
def test_caches_may_be_parts_of_larger_tensors(device, bits):
    """Rows of a larger buffer, and new tokens that are slices of the fused projection's output."""
    key_new, value_new, map = draw(torch.bfloat16, 64, 64, 32, device)
    fused = torch.cat((key_new, value_new), -1)
    cache = Cache(bits, torch.bfloat16, 32, batch=4, device=device)
    lengths = torch.tensor([5, 0, 8], dtype=torch.int32, device=device)
    parts = [None if tensor is None else tensor[1:] for tensor in cache.tensors()]
    append(fused[..., :64], fused[..., 64:], map, *parts, lengths, bits=bits, backend="triton")
    projected = torch.einsum("hrd,bhd->bhr", map.double().cpu(), key_new.double().cpu())
    for row, slot in enumerate(lengths.tolist()):
        cache.assert_holds(row + 1, slot, key_new[row], value_new[row], projected[row])
    cache.assert_untouched(but=[(1, 5), (2, 0), (3, 8)])


@pytest.mark.parametrize("bits", [16, 8, 4, 2])
def test_score_reads_what_append_wrote(device, bits):
    cache = Cache(bits, torch.float32, 32, device=device)
    key_new, value_new, map = draw(torch.float32, 64, 64, 32, device)
    cache.append(key_new, value_new, map, [0, 0, 0])
    lengths = torch.ones(3, dtype=torch.int32, device=device)
    query = torch.randn(3, 2, 4, 32, generator=torch.Generator().manual_seed(0)).to(device)
    scores = score(query, cache.codes, cache.scales, lengths, scaling=1.0, bits=bits, backend="triton")[..., 0]
    projected = torch.einsum("hrd,bhd->bhr", map.double(), key_new.double())
    exact = torch.einsum("bhgr,bhr->bhg", query.double(), projected)
    # Every code is off by at most half a step, in the direction that hurts most.
    step = 0 if bits == 16 else (projected.abs().amax(-1) / LARGEST[bits]).unsqueeze(-1)
    bound = query.double().abs().sum(-1) * step * 0.51 + 1e-4
    assert ((scores - exact).abs() <= bound).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key_new": torch.zeros(3, 2, 63)}, r"key: received \[3, 2, 63\] for a cache \[3, 2, 9, 64\]"),
        ({"value_new": torch.zeros(2, 2, 64)}, r"value: received \[2, 2, 64\]"),
        ({"lengths": torch.zeros(3).long()}, "lengths: received torch.int64"),
        ({"active": torch.zeros(3)}, "active: received torch.float32"),
        ({"map": torch.zeros(2, 31, 64)}, r"map: received \[2, 31, 64\], expected contiguous \[2, 32, 64\]"),
        ({"scales": None}, "scales: received none, expected float16"),
        ({"codes": torch.zeros(3, 2, 9, 32)}, "codes: received torch.float32, expected torch.uint8 for 4 bits"),
        ({"codes": torch.zeros(3, 2, 9, 32), "bits": 16}, "scales: received some with 16 bits, expected None"),
        ({"codes": torch.zeros(3, 2, 9, 32).long()}, "codes: received torch.int64"),
        ({"bits": 2}, r"map: received \[2, 32, 64\], expected contiguous \[2, 64, 64\]"),
        ({"bits": 6}, "bits: received 6, expected 16, 8, 4 or 2"),
        ({"offset": torch.zeros(2, 31)}, r"offset: received torch.float32 \[2, 31\], expected .* \[2, 32\]"),
        ({"value_sum": torch.zeros(3, 2, 64).half()}, "value_sum: received torch.float16"),
        ({"clip": -1.0}, "clip: received -1.0, expected a positive number"),
        ({"codes": torch.zeros(3, 2, 8, 16, dtype=torch.uint8)}, r"codes: received \[3, 2, 8, 16\]"),
        (
            {"codes": torch.zeros(3, 2, 9, 65, dtype=torch.int8), "map": None, "bits": 8},
            "codes: received rank 65 without a map",
        ),
    ],
)
def test_bad_arguments_are_named(changes, message):
    cache = Cache(4, torch.float32, 32)
    key_new, value_new, map = draw(torch.float32, 64, 64, 32, "cpu")
    names = ("key_new", "value_new", "map", "key", "value", "codes", "scales", "lengths")
    lengths = torch.zeros(3, dtype=torch.int32)
    arguments = dict(zip(names, (key_new, value_new, map, *cache.tensors(), lengths), strict=True))
    with pytest.raises(ValueError, match=message):
        append(**arguments | {"bits": 4} | changes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="long rows take a GPU")
@pytest.mark.parametrize("bits", [16, 8, 4, 2])
def test_rows_of_131072_whose_offsets_have_more_than_32_bits(device, monkeypatch, bits):
    monkeypatch.setitem(globals(), "CAPACITY", 131072)
    heads, batch, rank = 8, 17, 64
    cache = Cache(bits, torch.bfloat16, rank, 128, 128, batch, heads, device)
    key_new, value_new, map = draw(torch.bfloat16, 128, 128, rank, device, batch, heads)
    slots = [131071 - 7001 * row for row in range(batch)]
    cache.append(key_new, value_new, map, slots)
    projected = torch.einsum("hrd,bhd->bhr", map.double().cpu(), key_new.double().cpu())
    for row, slot in enumerate(slots):
        cache.assert_holds(row, slot, key_new[row], value_new[row], projected[row])
    cache.assert_untouched(but=list(enumerate(slots)))


def test_compiles_for_hopper_without_spilling_and_once_for_all_capacities():
    pytest.importorskip("triton")
    launches = compiled("""
import torch
from kvcal.kernels.append import append
def launch(capacity, head_dim, rank, bits, **options):
    new, cache = torch.zeros(2, 8, head_dim).half(), torch.zeros(2, 8, capacity, head_dim).half()
    scales = None if bits == 16 else torch.zeros(2, 8, capacity).half()
    dtype = {16: torch.float16, 8: torch.int8}.get(bits, torch.uint8)
    codes = torch.zeros(2, 8, capacity, rank * bits // 8 if bits < 8 else rank, dtype=dtype)
    map, lengths = new.new_zeros(8, rank, head_dim), torch.zeros(2, dtype=torch.int32)
    append(new, new, map, cache, cache, codes, scales, lengths, bits=bits, backend="triton", **options)
for capacity in (1, 1000, 4096):
    launch(capacity, 128, 32, 4)
offset, total = torch.zeros(8, 64), torch.zeros(2, 8, 128)
for capacity in (1, 4096):
    launch(capacity, 128, 64, 2, offset=offset, value_sum=total, summed_from=capacity % 5)
launch(64, 128, 64, 2)
launch(64, 256, 128, 8)
launch(64, 80, 48, 16)
""")
    assert all(launch["stack"] <= 16 for launch in launches), launches
    assert len({launch["hash"] for launch in launches[:3]}) == len({launch["hash"] for launch in launches[3:5]}) == 1
