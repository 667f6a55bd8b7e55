"""score_runs, candidate by candidate: scaling · (scale · (query · code) + bias) in float64, -inf beyond them."""

import itertools

import pytest
import torch
from compiling import compiled
from tolerances import assert_close

from kvcal.kernels.score import quantize, score_runs, unpack

BOTH = pytest.mark.parametrize("backend", ["triton", "reference"])
SCALING = 0.17
INF = torch.inf


class Problem:
    """Runs in any order of slots, some of them empty, then a range; codes of no candidate have scales of NaN."""

    def __init__(self, device, bits=4, group=4, rank=32, sizes=(), ranges=((5, 9),), each=False, tokens=200, heads=2):
        """Args: sizes: [B, Hkv(, G), R] of the runs; ranges: of each row."""
        generator = torch.Generator().manual_seed(bits + rank)
        self.bits, self.device, self.each = bits, device, each
        batch = len(ranges)
        self.shape = batch, heads, group
        self.query = torch.randn(batch, heads, group, rank, generator=generator).to(device)
        codes, scales = quantize(torch.randn(batch, heads, tokens, rank, generator=generator), bits)
        self.bias = 5 * torch.randn(batch, heads, group, generator=generator) + 40
        self.begin, self.end = (torch.tensor(of, dtype=torch.int32) for of in zip(*ranges, strict=True))
        self.starts = self.ends = None
        if len(sizes):
            sizes = torch.tensor(sizes, dtype=torch.int32)
            runs = sizes.shape[-1]
            order = torch.rand(batch, heads, runs, generator=generator).argsort(-1)
            self.starts = (order * (tokens // runs)).int()
            self.ends = sizes.cumsum(-1, dtype=torch.int32)
        self.slots = {}
        needed = torch.zeros(batch, heads, tokens, dtype=torch.bool)
        for row, head, member in itertools.product(range(batch), range(heads), range(group if each else 1)):
            where = (row, head, member) if each else (row, head)
            mine = []
            if len(sizes):
                for start, size in zip(self.starts[row, head].tolist(), sizes[where].tolist(), strict=True):
                    mine += range(start, start + size)
            mine += range(*ranges[row])
            self.slots[row, head, member] = mine
            needed[row, head, mine] = True
        self.keys = unpack(codes, bits).double() * scales.double().unsqueeze(-1)
        self.codes, self.scales = codes.to(device), scales.masked_fill(~needed, torch.nan).to(device)

    def run(self, backend, capacity, biased=True, combine="none", dtype=torch.float32, **options):
        batch, heads, group = self.shape
        poisoned = [
            torch.full(shape, torch.nan, dtype=dtype, device=self.device)
            for shape in ((batch, heads, group, capacity), (batch, heads, capacity))
        ]
        to = lambda tensor: None if tensor is None else tensor.to(self.device)  # noqa: E731
        return score_runs(
            self.query, self.codes, self.scales, to(self.begin), to(self.end), capacity=capacity, scaling=SCALING,
            bits=self.bits, starts=to(self.starts), ends=to(self.ends), bias=to(self.bias) if biased else None,
            combine=combine, out_dtype=dtype, out=poisoned[0], best=poisoned[1], backend=backend, **options,
        )  # fmt: skip

    def expected(self, capacity, biased=True, softcap=None):
        """[B, Hkv, G, M] float64."""
        out = torch.full((*self.shape, capacity), -INF, dtype=torch.float64)
        for row, head, member in itertools.product(*map(range, self.shape)):
            slots = self.slots[row, head, member if self.each else 0][:capacity]
            logits = self.keys[row, head, slots] @ self.query[row, head, member].double().cpu()
            if biased:
                bias = self.bias[row, head].double()
                logits += bias[member] if softcap else bias[member] - bias.max()
            logits *= SCALING
            out[row, head, member, : len(slots)] = softcap * torch.tanh(logits / softcap) if softcap else logits
        return out


SIZES = [[[3, 0, 20, 1, 7], [0, 0, 31, 0, 0]], [[0, 0, 0, 0, 0], [30, 30, 30, 30, 13]]]
RANGES = ((170, 199), (4, 4))


@BOTH
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize(("group", "rank"), [(4, 32), (1, 16), (7, 48), (8, 64), (3, 128)])
def test_candidates_of_runs_and_of_a_range(device, backend, bits, group, rank):
    problem = Problem(device, bits, group, rank, SIZES, RANGES)
    out, best = problem.run(backend, 144, combine="both")
    assert_close(out, problem.expected(144), torch.float16)
    assert_close(best, problem.expected(144).amax(2), torch.float16)


@BOTH
@pytest.mark.parametrize("bits", [4, 2])
def test_a_range_alone(device, backend, bits):
    problem = Problem(device, bits, ranges=((3, 160), (0, 0), (199, 200)))
    out, best = problem.run(backend, 170, combine="max")
    assert out is None
    assert_close(best, problem.expected(170).amax(2), torch.float16)


@BOTH
def test_runs_of_each_query(device, backend):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(0, 13, (2, 2, 3, 16), generator=generator).tolist()
    problem = Problem(device, group=3, sizes=sizes, ranges=((1, 6), (0, 90)), each=True)
    out, best = problem.run(backend, 300)
    assert best is None
    assert_close(out, problem.expected(300), torch.float16)


@BOTH
@pytest.mark.parametrize("each", [False, True])
def test_many_runs_and_less_room_than_candidates(device, backend, each):
    sizes = torch.arange(2 * 2 * (2 if each else 1) * 65).remainder(4).view(2, 2, *([2] if each else []), 65).tolist()
    problem = Problem(device, group=2, sizes=sizes, ranges=((0, 30), (7, 9)), each=each)
    assert_close(problem.run(backend, 61)[0], problem.expected(61), torch.float16)


@BOTH
def test_softcap_takes_the_whole_bias(device, backend):
    problem = Problem(device, sizes=SIZES, ranges=RANGES)
    out, _ = problem.run(backend, 150, softcap=9.0)
    assert_close(out, problem.expected(150, softcap=9.0), torch.float16)
    out, _ = problem.run(backend, 150, biased=False)
    assert_close(out, problem.expected(150, biased=False), torch.float16)


@BOTH
def test_float16_keeps_its_digits_whatever_the_groups_bias(device, backend):
    problem = Problem(device, sizes=SIZES, ranges=RANGES)
    problem.bias += 3000
    out, best = problem.run(backend, 144, combine="both", dtype=torch.float16)
    assert_close(out, problem.expected(144), torch.float16)
    assert torch.equal(best, out.amax(2))


def test_several_tiles_per_program(device, monkeypatch):
    from kvcal.kernels.score import runs_kernel

    monkeypatch.setattr(runs_kernel, "PROGRAMS", 1)
    problem = Problem(device, sizes=SIZES, ranges=((0, 200), (5, 9)))
    assert_close(problem.run("triton", 500)[0], problem.expected(500), torch.float16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 16}, "codes: received torch.uint8 with 16 bits"),
        ({"scales": torch.zeros(1, 1, 8)}, "scales: received torch.float32"),
        ({"begin": torch.zeros(1)}, "begin: received torch.float32"),
        ({"ends": None}, "starts, ends: received one of them"),
        ({"ends": torch.zeros(1, 1, 4, dtype=torch.int32)}, r"ends: received torch.int32 \[1, 1, 4\]"),
        ({"ends": torch.zeros(1, 1, 2, 3, dtype=torch.int32), "combine": "max"}, "combine: received 'max'"),
        ({"bias": torch.zeros(1, 1)}, "bias: received torch.float32"),
        ({"combine": "sum"}, "combine: received 'sum'"),
        ({"scaling": 0.0}, "scaling: received 0.0"),
        ({"query": torch.zeros(1, 1, 2, 30)}, r"codes: received \[1, 1, 8, 16\], expected .* of rank 30"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    codes, scales = quantize(torch.zeros(1, 1, 8, 32), 4)
    ints = torch.zeros(1, 1, 3, dtype=torch.int32)
    limit = torch.zeros(1, dtype=torch.int32)
    arguments = {"query": torch.zeros(1, 1, 2, 32), "codes": codes, "scales": scales, "begin": limit, "end": limit}
    arguments |= {"capacity": 8, "scaling": 1.0, "bits": 4, "starts": ints, "ends": ints}
    with pytest.raises(ValueError, match=message):
        score_runs(**arguments | changes)


def test_compiles_for_hopper_without_spilling_and_once_for_all_capacities():
    pytest.importorskip("triton")
    launches = compiled("""
import torch
from kvcal.kernels.score import score_runs
def launch(bits, rank, tokens, runs, capacity, combine="both", each=False, **options):
    codes = torch.zeros(1, 8, tokens, rank * bits // 8, dtype=torch.uint8 if bits < 8 else torch.int8)
    query, limit = torch.zeros(1, 8, 4, rank + 1), torch.zeros(1, dtype=torch.int32)
    ends = torch.zeros(1, 8, *([4] if each else []), runs, dtype=torch.int32) if runs else None
    starts = torch.zeros(1, 8, runs, dtype=torch.int32) if runs else None
    score_runs(query[..., :rank], codes, torch.zeros(1, 8, tokens).half(), limit, limit, capacity=capacity, bits=bits,
               scaling=0.1, starts=starts, ends=ends, bias=query[..., rank], combine=combine,
               out_dtype=torch.float16, backend="triton", **options)
for tokens, runs, capacity in ((8, 1, 8), (1000, 33, 17), (4096, 128, 512)):
    launch(2, 64, tokens, runs, capacity)
for tokens in (8, 1000, 4096):
    launch(4, 32, tokens, 0, tokens)
launch(4, 32, 4096, 128, 512, combine="max")
launch(8, 128, 4096, 128, 512, combine="none", each=True, softcap=30.0)
""")
    assert all(launch["stack"] == 0 for launch in launches), launches
    assert len({launch["hash"] for launch in launches[:3]}) == len({launch["hash"] for launch in launches[3:6]}) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="long rows take a GPU")
@pytest.mark.parametrize("bits", [4, 2])
def test_runs_of_131072(device, bits):
    sizes = [[[number * 7 % 33 for number in range(4000)]] * 2] * 2
    problem = Problem(device, bits, sizes=sizes, ranges=((131000, 131060), (0, 70)), tokens=131072)
    capacity = int(problem.ends.max()) + 70
    assert_close(problem.run("triton", capacity)[0], problem.expected(capacity), torch.float16)
