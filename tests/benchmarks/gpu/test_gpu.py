"""benchmarks/gpu on a CPU: all of both runs can be measured, a wrong kernel is found, and the page reads the rows."""

import json
import shutil
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from pytest import approx
from torch.utils._python_dispatch import TorchDispatchMode

TOKENS = 96
LONG = 131072
EXACT = (
    "dense",
    "loki",
    "loki, own index",
    "loki, sampled",
    "spectral",
    "spectral, rows 8",
    "spectral, quarter of 4 bits",
)


@pytest.fixture
def bench(module, monkeypatch):
    routines = module("routines")
    monkeypatch.setattr(routines, "interpreting", lambda: False)  # tests/kernels has the kernels in the interpreter
    return routines.Bench(module("sizes").DRY, torch.device("cpu"))


def test_all_of_both_runs(bench, module, monkeypatch, tmp_path):
    """Every call taken to last 10 µs; the page reads what was saved."""
    timing, run, tools = module("timing"), module("run"), module("tools")

    def microseconds(timer, calls, moved=0):
        for call in calls:
            call()
        return {"us": 10.0, "low": 9.0, "high": 11.0}

    monkeypatch.setattr(timing.Timer, "microseconds", microseconds)
    monkeypatch.setattr(timing.Timer, "milliseconds", lambda timer, call: call() or 2.0)
    monkeypatch.setattr(module("baselines"), "flex_attention", lambda compiled: pytest.fail("minutes to compile"))
    for name in ("first", "second"):
        out = run.Run(name, tmp_path, True, 600.0, [sys.executable], {"commit": "abc"})
        out.put(module("worker").answer(bench, {"kind": "machine"}) | {"gpu": "Made Up", **tools.card()})
        for row in (row for phase in module(name).phases(bench.sizes) for row in phase.rows):
            if row.get("method") != "flex attention":
                watched = tools.watched(row, bench.sizes, tmp_path)
                out.put({**module("worker").answer(bench, watched[2] if watched else row), **row})
        out.close()
        assert [row for row in out.rows if row.get("passed") is False or row.get("unproven")] == []
        assert [row for row in out.rows if "failed" in row and row["kind"] != "baseline"] == []
    for row in (row for row in out.rows if row["kind"] == "model"):
        assert row["why_not_captured"].startswith("CUDA graphs need a GPU")
    said = (tmp_path / "first.log").read_text()
    assert "check step spectral: right; 1 compared" in said and "No module named 'flashinfer'" in said
    assert "step dense, 192 tokens, batch 2: 10.0 µs; expected 8.5 µs (3 launches, 0.1 MB)" in said  # at 105 GB/s
    shutil.copytree(tmp_path, tmp_path / "results" / "gpu", ignore=shutil.ignore_patterns("results"))
    text = written(module, tmp_path)
    assert "| 192 | 2 | 10.0 (dense) | 10.0 (1.00×) |" in text and "†" not in text.partition("##")[2]
    assert "15 of 15 checks of the kernels passed." in text
    assert "| 192 | 1 | clusterkv 8 | 10.0 (97.8) | 0.0 | append 10.0 (2.5), attend 10.0 (8.5, " in text


def test_the_runs_name_what_there_is(module):
    """And ask for each before what depends on it."""
    first, second, sizes = module("first"), module("second"), module("sizes").FULL
    assert set(first.CHECKS) == set(module("checks").KERNELS)
    assert set(sizes.methods) == set(module("attention_steps").methods(sizes))
    assert set(first.BASELINES) == set(module("baselines").BASELINES)
    assert set(second.SANITIZED) <= {*first.CHECKS, *(f"step {method}" for method in sizes.methods)} and set(
        second.COUNTED
    ) <= set(sizes.methods)
    for run, minutes in ((first, 6), (second, 5)):
        phases = run.phases(sizes)
        rows = [row for phase in phases for row in phase.rows]
        assert {row["kind"] for row in rows} <= {*module("routines").ROUTINES, "counters", "sanitizer"}
        needed = [check for row in rows for check in module("results").rests_on(row)]
        assert set(needed) <= {*first.CHECKS, *(f"step {method}" for method in sizes.methods)}
        assert sum(phase.kept for phase in phases) < 60 * minutes
    gate, steps, *_ = first.phases(sizes)
    assert (gate.fresh, gate.at_once) == (True, 8) and gate.most <= 120 and gate.limit <= 100
    measured = [(row["method"], row["batch"]) for row in steps.rows if row["kind"] == "step"]
    assert sorted(measured) == sorted((method, batch) for method in sizes.methods for batch in sizes.batches)
    assert not any(row["kind"] in ("parts", "trace") for row in steps.rows)  # of every method first
    one = [row for row in steps.rows if row.get("batch") == 8]
    assert len(one) <= 20  # graphs that are captured for the caches of one shape
    assert [phase.rows[0]["kind"] for phase in second.phases(sizes)] == ["model", "build", "counters", "sanitizer"]


def test_a_wrong_kernel_is_found(bench, module, monkeypatch):
    gate, worker = module("gate"), module("worker")
    right = gate.score

    def wrong(*args, out, **options):
        return right(*args, out=out, **options).mul_(1.01)

    monkeypatch.setattr(gate, "score", wrong)
    found = worker.answer(bench, {"kind": "check", "check": "score"})
    assert not found["passed"] and found["worst"] > 1 and len(found["found"]) == 4
    assert "check score: WRONG; 4 compared, worst" in module("results").brief(found)
    assert worker.answer(bench, {"kind": "check", "check": "append"})["passed"]


def test_a_check_that_raises_keeps_what_it_found(bench, module, monkeypatch):
    def check_raising(gate):
        gate.at_most("before", 0.0, 1.0)
        raise RuntimeError("illegal memory access\nat some length")

    monkeypatch.setitem(module("checks").KERNELS, "score", check_raising)
    found = module("worker").answer(bench, {"kind": "check", "check": "score"})
    assert not found["passed"] and found["failed"] == "RuntimeError: illegal memory access"
    assert [of["check"] for of in found["found"]] == ["before"] and "restart" not in found


def test_a_device_that_answers_no_more_asks_for_another_process(bench, module, monkeypatch):
    """As after an illegal address, which every later call reports again, or a capture that did not end."""
    worker = module("worker")

    def broken(*args):
        raise RuntimeError("CUDA error: illegal")

    monkeypatch.setattr(worker, "wait", broken)
    found = worker.answer(bench, {"kind": "check", "check": "append"})
    assert found["restart"] and found["failed"] == "RuntimeError: CUDA error: illegal"
    monkeypatch.undo()
    monkeypatch.setattr(worker.torch, "rand", broken)
    found = worker.answer(bench, {"kind": "check", "check": "append"})
    assert found["restart"] and found["failed"] == "the device answers no more" and found["passed"]


def test_nan_is_never_near(module):
    gate = module("gate").Gate(module("sizes").DRY, torch.device("cpu"), "reference")
    expected = torch.tensor([1.0, -torch.inf])
    for out in ([torch.nan, -torch.inf], [1.0, torch.nan], [1.0, 0.0], [torch.inf, -torch.inf]):
        gate.near("", torch.tensor(out), expected, 0.5)
    gate.near("", expected, expected, 0.5)
    assert [check["passed"] for check in gate.found] == [False] * 4 + [True]
    json.dumps(gate.found, allow_nan=False)


def test_steps_that_read_everything_are_dense(module):
    """Each of the measured steps against one softmax in float64."""
    sizes = replace(module("sizes").DRY, keep=TOKENS, numbers="float32")
    for name, make in module("attention_steps").methods(sizes).items():
        copy = module("caches").draw(sizes, 2, TOKENS, torch.device("cpu"))
        key, value = copy.key.double(), copy.value.double()
        key[:, :, -1:], value[:, :, -1:] = copy.key_new.double(), copy.value_new.double()
        weights = (copy.grouped.double() @ key.mT * sizes.scaling).softmax(-1)
        out = make(copy).step()
        close = {"rtol": 0, "atol": 0.02} if "rows 8" in name else {"rtol": 1e-4, "atol": 1e-5}  # of rounded rows
        torch.testing.assert_close(out.double(), (weights @ value).flatten(1, 2).unsqueeze(2), **close)


class Launches(TorchDispatchMode):
    """Counts operations of torch that are no views, and kernels, which do not run: no launch depends on values."""

    def __init__(self, monkeypatch):
        super().__init__()
        interpreter = pytest.importorskip("triton.runtime.interpreter")
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *args, **kwargs: self.launched())
        self.kernels = self.operations = 0

    def launched(self):
        self.kernels += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aliases = [given.alias_info for given in function._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in aliases)
        self.operations += not view and not any(free in str(function) for free in ("empty", "detach", "_unsafe_view"))
        return function(*args, **(kwargs or {}))

    def of(self, call):
        self.kernels = self.operations = 0
        with self:
            call()
        return self.kernels, self.operations


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels would run")
def test_launches_are_those_that_are_reckoned_with(module, monkeypatch):
    """As kernels/README.md has them, where more tokens are held than a scan takes for a sample. Operations of torch
    that a step mostly consists of are reckoned with about."""
    monkeypatch.setattr("kvcal.kernels.scan.MOST_SAMPLED", TOKENS - 1)
    sizes, caches, expected = module("sizes").DRY, module("caches"), module("expected")
    launches = Launches(monkeypatch)
    seen = {}
    for batch in sizes.batches:
        copy = caches.draw(sizes, batch, TOKENS, torch.device("cpu"))
        for name, make in module("attention_steps").methods(sizes).items():
            with caches.forced("reference"):
                method, works = make(copy), expected.parts(sizes, name, TOKENS, batch)
            with caches.forced("triton"):
                method.step()  # makes what all later steps share
                seen[name, batch] = launches.of(method.step)
                step, near = expected.step(sizes, name, TOKENS, batch), 0 if name in EXACT else 0.05
                assert seen[name, batch] == (step.kernels, approx(step.operations, rel=near)), (name, batch)
                for part, call in method.parts.items():
                    reckoned = works[part].kernels, approx(works[part].operations, rel=near)
                    assert launches.of(call) == reckoned, (name, part)
    assert seen["dense", 1] == (3, 0) and seen["clusterkv 8", 2][0] == 3
    for name, batch in seen:
        assert not name.startswith("spectral") or seen[name, batch] == (3, 0)
    assert seen["loki", 1] == (5, 12) and seen["loki, own index", 1] == (5, 11)


def test_bytes_by_hand(module):
    """Of Llama-3-8B's shape at 131072 tokens: the numbers of the kernels' READMEs."""
    expected, sizes = module("expected"), module("sizes").FULL
    step = partial(expected.step, sizes, length=LONG)
    rows = 8 * 2048 * (2 * 128 * 2 + 4)
    assert step("dense", batch=1).bytes == 2 * 8 * LONG * 128 * 2
    assert step("dense", batch=8).bytes == 8 * step("dense", batch=1).bytes
    assert step("loki", batch=1).bytes == 8 * LONG * (64 + 4 * 4 + 4) + rows
    clusters = round((LONG - 160 - 16) / 80)
    assert step("clusterkv 80", batch=1).bytes == 8 * clusters * (256 + 4) + 8 * 2048 * 4 + rows
    codebook = 64 * (4 * 128 + 1) + 2 * 64 * 128
    spectral = 8 * (LONG * (64 // 4 + 3) + LONG // 64 * 130 + 2048 * 2 * 128 * 2)
    assert step("spectral", batch=1).bytes == spectral + 8 * 2 * codebook
    assert step("spectral", batch=8).bytes == 8 * spectral + 8 * 2 * codebook
    # 537 MB at 90 % of 4.3 TB/s are 139 µs, and three launches of 2.5.
    assert step("dense", batch=1).microseconds(4300) == approx(138.7 + 7.5, abs=0.1)
    weights = 32 * (4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)) + 128256 * 4096
    model = expected.model(sizes, "full", LONG, 1)
    assert model.bytes == 2 * weights + 32 * step("dense", batch=1).bytes
    assert (model.kernels, model.operations) == (96, 32 * 37)


@pytest.fixture
def graphs(monkeypatch):
    """CUDA streams and graphs that only remember which stream is current; a capture that fails leaves its own."""
    cuda = SimpleNamespace(current="the caller's")

    class Stream:
        def wait_stream(self, other):
            pass

    @contextmanager
    def capturing(graph):
        cuda.current = "the capture's"
        yield  # an exception leaves it, as torch.cuda.graph's does when the end of its capture raises
        cuda.current = "the caller's"

    @contextmanager
    def stream(other):
        yield

    for name, fake in (
        ("Stream", Stream),
        ("CUDAGraph", object),
        ("graph", capturing),
        ("stream", stream),
        ("current_stream", Stream),
        ("set_stream", lambda stream: setattr(cuda, "current", "the caller's")),
    ):
        monkeypatch.setattr(torch.cuda, name, fake)
    return cuda


def test_a_capture_that_fails_leaves_the_stream_as_it_was(graphs, module):
    calls = []

    def once():
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        module("timing").captured([once])
    assert graphs.current == "the caller's"
    module("timing").captured([lambda: None])
    assert graphs.current == "the caller's"


def made_up(folder, name, rows, gpu="NVIDIA Made Up"):
    """The results of one run, in round numbers."""
    machine = {"kind": "machine", "gpu": gpu, "driver": "1", "torch": "2", "triton": "3", "transformers": "4"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"run": name, "commit": "abc", "rows": [machine, *rows]}))


def written(module, tmp_path):
    """The page of what lies in results, with its figures beside it."""
    page = module("page").PAGE
    page.write(tmp_path / "results", tmp_path)
    return (tmp_path / page.name).read_text()


def attention(kind, method, us, batch=8, length=LONG, **more):
    measured = {"us": us, "expected_us": us / 2, "bytes": 1_000_000, "launches_expected": 3}
    return {"kind": kind, "method": method, "length": length, "batch": batch, **measured, **more}


def test_the_page(module, tmp_path):
    """Two runs of one GPU in two folders; the check that dense rests on has failed."""
    sizes = module("sizes").FULL
    passed = [*module("first").CHECKS, *(f"step {method}" for method in sizes.methods)]
    checks = [{"kind": "check", "check": name, "passed": name != "dense"} for name in passed]
    parts = {name: {"us": 20.0, "expected_us": 10.0, "bytes": 8_000_000} for name in ("score", "attend")}
    kernels = {"score_kernel": {"n": 1, "us": 21.0, "gap": 1.5}}
    made_up(tmp_path / "results" / "gpu" / "a", "first", [
        *checks,
        {"kind": "ceilings", "copy": 4000.0, "read": 4200.0},
        attention("step", "dense", 90.0),
        attention("step", "loki", 50.0),
        attention("step", "spectral", 20.0, batch=1),
        attention("baseline", "SDPA flash", 100.0),
        attention("baseline", "SDPA flash", 80.0, batch=1),
        {"kind": "baseline", "method": "FlashInfer", "length": LONG, "batch": 8, "failed": "No module 'flashinfer'"},
        {**attention("parts", "loki", 0.0), "parts": parts},
        attention("trace", "loki", 52.0, launches=6, kernels=kernels),
        attention("step", "loki", 30.0, batch=1, length=8192),
        {"kind": "step", "method": "loki", "length": 32768, "batch": 1, "skipped": "no time left"},
    ])  # fmt: skip
    model = {"kind": "model", "length": LONG, "batch": 6, "why_not_captured": None, "cache_bytes": 16e9}
    model |= {"expected_us": 15000.0, "tokens_per_s": 50.0}
    made_up(tmp_path / "results" / "gpu" / "b", "second", [
        {**model, "method": "full", "ms": 20.0},
        {**model, "method": "loki", "ms": 8.0},
        {"kind": "build", "length": LONG, "calibrated": False, "failed": "it took more than 40 s and was stopped"},
        {"kind": "counters", "method": "loki", "length": LONG, "batch": 8,
         "counters": [{"kernel": "score_kernel", "Duration": "21.5 us"}]},
    ])  # fmt: skip
    text = written(module, tmp_path)
    assert "Nothing was measured yet" not in text
    assert text.count("## NVIDIA Made Up") == 1 and "(gpu-nvidia-made-up.png)" in text
    assert (tmp_path / "gpu-nvidia-made-up.png").read_bytes().startswith(b"\x89PNG")
    assert "14 of 15 checks of the kernels passed. Not passed: dense (wrong); what rests on them is marked †." in text
    # Dense is faster than the fastest that is known to be right, and compared with by nobody.
    assert f"| {LONG} | 8 | 100.0 (SDPA flash) | 90.0 † (1.11×) | 50.0 (2.00×) | – |" in text
    assert "- spectral, batch 1: 4.00× the fastest dense step (SDPA flash), target 4.1×." in text
    parts = "score 20.0 (10.0, 400 GB/s), attend 20.0 (10.0, 400 GB/s)"
    assert f"| {LONG} | 8 | loki | 50.0 (25.0) | 1.0 | {parts} | 10.0 |" in text
    assert "| 52.0 | 6 (3) | 1 × 21.0 + 1.5 `score_kernel` |" in text
    assert "- FlashInfer: No module 'flashinfer'" in text and "took more than 40 s" in text
    assert f"| {LONG} | 6 | loki | 8.00 | 15.00 | 50 | 2.50 | 16.0 |" in text
    assert f"| {LONG} | 6 | full | 20.00 † | 15.00 | 50 | 1.00 | 16.0 |" in text
    assert "| loki | 8 | `score_kernel` | 21.5 us |" in text
    assert "Not measured: step loki 32768 1." in text


def test_a_row_that_was_measured_at_last_is_on_the_page(module, tmp_path):
    """Of two runs of the same rows, whichever is read first."""
    for skipped, timed in ("ab", "ba"):
        results = tmp_path / skipped
        made_up(results / skipped, "first", [{**attention("step", "dense", 0.0), "skipped": "no time left"}])
        made_up(results / timed, "first", [attention("step", "dense", 90.0)])
        made_up(results / "c", "first", [attention("step", "dense", 70.0)], gpu="another")
        one, other = module("page").read(results)
        steps = [row for row in one["rows"] if row["kind"] == "step"]
        assert [row["us"] for row in steps] == [90.0] and other["gpu"] == "another"


def test_a_page_without_runs_says_so(module, tmp_path):
    assert "Nothing was measured yet" in written(module, tmp_path)


def test_a_run_without_times_has_a_page(module, tmp_path):
    """As of `--dry`, or where every step failed."""
    step = {
        "kind": "step",
        "method": "dense",
        "length": LONG,
        "batch": 1,
        "expected_us": 9.0,
        "failed": "RuntimeError: no",
    }
    made_up(tmp_path / "results" / "gpu" / "a", "first", [step])
    text = written(module, tmp_path)
    assert "No attention step was timed." in text and "- dense: RuntimeError: no" in text
    assert not list(tmp_path.glob("*.png"))
