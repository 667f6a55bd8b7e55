"""`select_runs` against a loop over one row's clusters in the order of Python's own sort."""

import itertools

import pytest
import torch
from compiling import compiled

from kvcal.kernels.select import runs_kernel as kernel
from kvcal.kernels.select import select_runs

INF, NAN = float("inf"), float("nan")
POISON = -7
BOTH = pytest.mark.parametrize("backend", ["triton", "reference"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])


@pytest.fixture
def small_tiles(monkeypatch):
    """Rows beyond 256 clusters are read in several tiles."""
    monkeypatch.setattr(kernel, "TILES", {64: 1, 256: 1})


def taken_of(scores, sizes, count, room, most):
    """{cluster: tokens} of one row, all lists of Python numbers."""
    able = [at for at in range(count) if scores[at] > -INF and sizes[at] > 0]  # NaN is above nothing
    taken = {}
    for at in sorted(able, key=lambda at: (-scores[at], at))[:most]:
        if room > 0:
            taken[at] = min(sizes[at], room)
            room -= taken[at]
    return taken


class Problem:
    """Clusters laid side by side in a shuffled order of slots; outputs are poisoned."""

    def __init__(self, scores, counts, room, heads=None, sizes=None, leading=2, slots=None, device="cpu", seed=0):
        generator = torch.Generator().manual_seed(seed)
        batch, own_heads, clusters = scores.shape
        shape = (batch, heads or own_heads, clusters)
        self.sizes = torch.randint(0, 9, shape, generator=generator).int() if sizes is None else sizes
        order = torch.rand(shape, generator=generator).argsort(-1)
        ends = self.sizes.clamp_min(0).gather(-1, order).cumsum(-1)
        self.starts = torch.zeros(shape, dtype=torch.int64).scatter_(-1, order, ends).int() - self.sizes
        self.scores, self.counts = scores, torch.tensor(counts, dtype=torch.int32)
        self.room = torch.tensor(room, dtype=torch.int32)
        self.leading = None
        if leading:
            self.leading = tuple(torch.randint(0, 99, (batch, leading), generator=generator).int() for _ in "ab")
        self.first, self.slots, self.device = leading, slots or clusters, device

    def run(self, backend="triton"):
        batch, heads, _ = self.scores.shape
        to = lambda tensor: tensor.to(self.device)  # noqa: E731
        width = self.first + self.slots
        self.buffers = [
            torch.full((batch * heads * width + 8,), POISON, dtype=torch.int32, device=self.device) for _ in "ab"
        ]
        out = [buffer[:-8].view(batch, heads, width) for buffer in self.buffers]
        out.append(torch.full((batch, heads), POISON, dtype=torch.int32, device=self.device))
        self.unread = torch.full(self.scores.shape, NAN, device=self.device)
        scores, starts, sizes, room, counts = map(to, (self.scores, self.starts, self.sizes, self.room, self.counts))
        result = select_runs(
            scores, starts, sizes, room, counts,
            leading=self.leading and tuple(map(to, self.leading)), capacity_out=self.slots, out=tuple(out),
            unread=self.unread, backend=backend,
        )  # fmt: skip
        assert all(given is returned for given, returned in zip(out, result, strict=True))
        return [tensor.cpu() for tensor in result]

    def check(self, backend="triton"):
        starts, sizes, count = self.run(backend)
        batch, heads, clusters = self.scores.shape
        sharing = heads // self.sizes.shape[1]
        for b, h in itertools.product(range(batch), range(heads)):
            size, start = self.sizes[b, h // sharing].tolist(), self.starts[b, h // sharing].tolist()
            room = int(self.room[b] if self.room.dim() == 1 else self.room[b, h])
            number = min(max(int(self.counts[b]), 0), clusters)
            taken = taken_of(self.scores[b, h].tolist(), size, number, room, self.slots)
            lead = [of[b].tolist() for of in self.leading] if self.first else [[], []]
            chosen = sorted(taken)
            rest = [0] * (self.slots - len(chosen))
            assert count[b, h] == self.first + len(chosen), (b, h)
            assert starts[b, h].tolist() == lead[0] + [start[at] for at in chosen] + rest, (b, h)
            assert sizes[b, h].tolist() == lead[1] + [taken[at] for at in chosen] + rest, (b, h)
            left = [max(size[at], 0) - taken.get(at, 0) if at < number else 0 for at in range(clusters)]
            assert self.unread[b, h].tolist() == left, (b, h)
        assert all(buffer[-8:].eq(POISON).all() for buffer in self.buffers), "written beyond the last slot"


def drawn(clusters, dtype, kind, batch=3, heads=2):
    generator = torch.Generator().manual_seed(clusters)
    scores = torch.randn(batch, heads, clusters, generator=generator)
    coin = torch.rand(batch, heads, clusters, generator=generator)
    if kind == "ties":
        scores = (scores * 2).round() / 2
        scores = torch.where((scores == 0) & (coin < 0.5), -0.0, scores)
    if kind == "absent":
        scores = torch.where(coin < 0.3, -INF, torch.where(coin < 0.4, NAN, torch.where(coin < 0.5, INF, scores)))
    if kind == "equal":
        scores = torch.full_like(scores, -3.0)
    return scores.to(dtype)


@BOTH
@DTYPES
@pytest.mark.parametrize("kind", ["normal", "ties", "absent", "equal"])
@pytest.mark.parametrize("clusters", [1, 7, 200, 600])
def test_the_clusters_that_fill_the_room(clusters, kind, dtype, backend, small_tiles, device):
    counts = [clusters, max(1, clusters - 3), clusters // 2]
    scores = drawn(clusters, dtype, kind, heads=1 if clusters > 256 else 2)
    for row, count in enumerate(counts):
        scores[row, :, count:] = INF  # what is beyond a row's clusters would win
    for room in ([1, 4 * clusters // 3, 9 * clusters], [3 * clusters, 0, -5]):
        Problem(scores, counts, room, device=device).check(backend)


@BOTH
@pytest.mark.parametrize("clusters", [90, 600])
def test_fewer_slots_than_clusters_that_would_fit(clusters, backend, small_tiles, device):
    for kind, slots in (("normal", 1), ("ties", 30)):
        scores = drawn(clusters, torch.float16, kind, heads=1)
        Problem(scores, [clusters] * 3, [20, clusters, 9 * clusters], slots=slots, device=device).check(backend)


@BOTH
def test_heads_that_share_clusters_and_have_room_of_their_own(backend, small_tiles, device):
    scores = drawn(120, torch.float32, "normal", batch=2, heads=6)
    room = torch.arange(12).mul(37).view(2, 6).tolist()
    Problem(scores, [120, 77], room, heads=2, leading=0, device=device).check(backend)


@BOTH
def test_sizes_that_are_none_and_counts_beyond_the_row(backend, small_tiles, device):
    sizes = torch.tensor([[[0, -4, 5, 0, 2]], [[0, 0, 0, 0, 0]]], dtype=torch.int32)
    scores = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]).expand(2, 1, -1).contiguous()
    Problem(scores, [9, 5], [6, 6], sizes=sizes, device=device).check(backend)
    Problem(scores, [0, -1], [6, 6], sizes=sizes, device=device).check(backend)


def test_parts_of_larger_buffers(small_tiles, device):
    """Capacities and strides that are multiples of 16 bytes, and such that are not."""
    for clusters, begin in ((64, 8), (301, 3)):
        problem = Problem(drawn(clusters, torch.float16, "ties"), [clusters] * 3, [55, 100, 200], device=device)
        for name in ("scores", "starts", "sizes"):
            tensor = getattr(problem, name)
            wide = tensor.new_full((3, 4, clusters + 16), 77)
            wide[:, 1:3, begin : begin + clusters] = tensor
            setattr(problem, name, wide[:, 1:3, begin : begin + clusters])
        problem.check()


@pytest.mark.parametrize("clusters", [1638, 9000])
def test_real_sizes(clusters, device):
    problem = Problem(drawn(clusters, torch.float16, "ties", batch=2, heads=1), [clusters, clusters - 5], [2048, 99])
    problem.device, problem.slots = device, 2048
    problem.check()


def test_what_does_not_fit_is_named():
    scores, ints = torch.zeros(2, 4, 8), torch.zeros(2, 2, 8, dtype=torch.int32)
    room = torch.zeros(2, dtype=torch.int32)
    arguments = {"scores": scores, "starts": ints, "sizes": ints, "room": room, "counts": room}
    for change, message in [
        ({"scores": scores.double()}, "scores: received torch.float64"),
        ({"starts": ints.long()}, r"starts: received torch.int64 .*, expected int32 \[2, 4 or a divisor, 8\]"),
        ({"sizes": ints[:, :1].expand(2, 3, 8)}, r"sizes: received torch.int32 \[2, 3, 8\]"),
        ({"room": room.long()}, "room: received torch.int64"),
        ({"room": ints[:, :, 0].contiguous()}, r"room: received torch.int32 \[2, 2\] .* \[2, 4\]"),
        ({"counts": room[:1]}, r"counts: received torch.int32 \[1\]"),
        ({"leading": (ints[:, 0], ints[:, 0])}, "leading starts: received"),
        ({"leading": (torch.zeros(2, 17, dtype=torch.int32),) * 2}, "leading: received 17 runs, expected 1 to 16"),
        ({"capacity_out": 0}, "capacity_out: received 0"),
        ({"unread": scores.half()}, "unread: received torch.float16"),
        ({"out": (ints, ints, room)}, r"out starts: received torch.int32 \[2, 2, 8\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            select_runs(**arguments | change)


def test_compiles_for_hopper_without_spilling_and_once_for_all_counts_and_capacities():
    pytest.importorskip("triton")
    launches = compiled("""
import torch
from kvcal.kernels.select import select_runs
def launch(clusters, dtype, slots, batch=1, unread=False, leading=2):
    ints = torch.zeros(batch, 8, clusters, dtype=torch.int32)
    row = torch.ones(batch, dtype=torch.int32)
    lead = (torch.zeros(batch, leading, dtype=torch.int32),) * 2 if leading else None
    select_runs(torch.zeros(batch, 8, clusters, dtype=dtype), ints, ints, row, row, leading=lead, capacity_out=slots,
                unread=torch.zeros(batch, 8, clusters) if unread else None, backend="triton")
launch(1640, torch.float32, 2048)
launch(96, torch.float32, 77, batch=3, leading=1)
launch(16, torch.float32, 16)
launch(8192, torch.float32, 2048)
launch(9000, torch.float32, 16)
launch(8192, torch.float32, 2048, unread=True)
launch(8200, torch.float16, 2048)
""")
    assert all(launch["stack"] == 0 for launch in launches), launches
    assert len({launch["hash"] for launch in launches[:3]}) == len({launch["hash"] for launch in launches[3:5]}) == 1


ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@ON_GPU
@DTYPES
@pytest.mark.parametrize("clusters", [1638, 8192, 16384, 131072])
def test_long_rows(clusters, dtype, device):
    for kind in ("normal", "ties", "absent"):
        scores = drawn(clusters, dtype, kind, batch=2, heads=8)
        room = [2048, 131072]
        problem = Problem(scores, [clusters, clusters - 77], room, slots=min(clusters, 4096), device=device)
        actual = problem.run("triton")
        unread = problem.unread.cpu()
        assert all(map(torch.equal, actual, problem.run("reference")))
        assert torch.equal(unread, problem.unread.cpu())


@ON_GPU
def test_a_captured_graph_follows_its_inputs_and_nothing_compiles_again(device):
    problem = Problem(drawn(1640, torch.float32, "normal"), [1640, 99, 5], [500, 40, 3], device=device)
    names = ("scores", "starts", "sizes", "room", "counts")
    operands = {name: getattr(problem, name).to(device) for name in names}
    leading = tuple(of.to(device) for of in problem.leading)
    out = select_runs(**operands, leading=leading)
    compiled_before = compiled_kernels()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        select_runs(**operands, leading=leading, out=out, backend="triton")
    for counts, room in (([1640, 99, 5], [500, 40, 3]), ([1, 1640, 800], [9999, 1, 0])):
        operands["scores"].normal_()
        operands["counts"].copy_(torch.tensor(counts))
        operands["room"].copy_(torch.tensor(room))
        graph.replay()
        expected = select_runs(**operands, leading=leading, backend="reference")
        assert all(map(torch.equal, out, expected))
    for clusters, slots in ((1024, 7), (2000, 2000), (16, 1)):
        some = {name: of[..., :clusters].contiguous() if of.dim() == 3 else of for name, of in operands.items()}
        select_runs(**some, leading=leading, capacity_out=slots)
    assert compiled_kernels() == compiled_before, "other counts, capacities or slots compiled another kernel"


def compiled_kernels() -> int:
    return sum(len(cache[0]) for cache in kernel.runs_kernel.device_caches.values())
