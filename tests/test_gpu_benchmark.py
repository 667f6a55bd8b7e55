"""benchmarks/gpu.py on a CPU: that all of it runs, that a wrong kernel stops it, and what its page makes of numbers."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TOKENS = 96


@pytest.fixture
def module(monkeypatch):
    """Imports one of its files, which find one another as scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def gpu(module, monkeypatch):
    gpu = module("gpu")
    monkeypatch.setattr(gpu, "interpreting", lambda: False)  # tests/kernels has the kernels in the interpreter
    return gpu


def test_dry_measures_everything_and_writes_nothing(gpu, tmp_path, capsys):
    page = BENCHMARKS.parent / "docs" / "results" / "gpu.md"
    before = page.read_bytes() if page.exists() else None
    assert gpu.main(["--dry", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    spectral = ("spectral, int4", "spectral, int2", "spectral, int4, flat", "spectral, int2, flat", "spectral int2")
    ours = ("dense", "loki, own index", "loki, int4", "loki, int2", "clusterkv 4", "full", *spectral)
    for name in (*ours, "SDPA flash", "flex attention"):
        assert f"method {name}" in said
    assert "WRONG" not in said and "on reference" in said and "No module named 'flashinfer'" in said
    for task in ("attention of 192 tokens, batch 2", "model at 128 tokens, as many rows as fit", "clusters of 192"):
        assert f"of it for {task}" in said
    for line in said.splitlines():
        assert "failed" not in line or "SDPA" in line or "No module named" in line
        assert "of it for" not in line or ": " not in line  # nor a task as a whole
    assert not list(tmp_path.iterdir())
    assert (page.read_bytes() if page.exists() else None) == before


def test_a_wrong_kernel_stops_it(gpu, module, monkeypatch, capsys):
    gate = module("gpu_gate")
    right = gate.score

    def wrong(*args, out, **options):
        return right(*args, out=out, **options).mul_(1.01)

    monkeypatch.setattr(gate, "score", wrong)
    monkeypatch.setattr(gpu, "CHECKS", (gate.check_append, gate.check_score))
    assert gpu.main(["--dry"]) == 1
    said = capsys.readouterr().out
    assert "WRONG" in said and "score 4" in said and "ceilings" not in said


def test_a_kernel_that_raises_is_wrong(gpu, monkeypatch, capsys):
    def check_raising(gate):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(gpu, "CHECKS", (check_raising,))
    assert gpu.main(["--dry"]) == 1
    assert "check_raising: RuntimeError: illegal memory access" in capsys.readouterr().out


def test_nan_is_never_near(module):
    gate = module("gpu_gate").Gate(module("gpu_sizes").DRY, torch.device("cpu"), "reference")
    expected = torch.tensor([1.0, -torch.inf])
    for out in ([torch.nan, -torch.inf], [1.0, torch.nan], [1.0, 0.0], [torch.inf, -torch.inf]):
        gate.near("", torch.tensor(out), expected, 0.5)
    gate.near("", expected, expected, 0.5)
    assert [check["passed"] for check in gate.checks] == [False] * 4 + [True]


def test_what_time_does_not_suffice_for_is_skipped_by_name(gpu, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "CHECKS", ())
    assert gpu.main(["--dry", "--minutes", "0"]) == 0
    said = capsys.readouterr().out
    assert "skipped, no time left: attention of 192 tokens, batch 1" in said and "of it for attention" not in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(gpu, capsys):
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "error: no GPU here; --dry runs the same, tiny, on a CPU\n"


def test_steps_that_read_everything_are_dense(module):
    """Each of the measured steps, those over 4 and 2 bits and spectral's too, against one softmax in float64."""
    sizes = replace(module("gpu_sizes").DRY, keep=TOKENS, dtype=torch.float32)
    for name, make in module("gpu_methods").methods(sizes).items():
        copy = module("gpu_caches").draw(sizes, 2, TOKENS, torch.device("cpu"), rotated=name == "loki")
        key, value = copy.key.double(), copy.value.double()
        if name == "loki":
            key = key @ copy.basis.double()  # back out of it
        key[:, :, -1:], value[:, :, -1:] = copy.key_new.double(), copy.value_new.double()
        weights = (copy.grouped.double() @ key.mT * sizes.scaling).softmax(-1)
        out = make(copy).step()
        torch.testing.assert_close(out.double(), (weights @ value).flatten(1, 2).unsqueeze(2), rtol=1e-4, atol=1e-5)


def test_what_is_measured_is_what_the_page_reads(gpu, module, monkeypatch, tmp_path):
    """All tasks but the model's, every call taken to last 10 µs."""
    timing = module("gpu_timing")

    def microseconds(timer, calls, moved=0):
        for call in calls:
            call()
        return {"us": 10.0, "low": 9.0, "high": 11.0}

    monkeypatch.setattr(timing.Timer, "microseconds", microseconds)
    monkeypatch.setattr(timing.Timer, "milliseconds", lambda timer, call: call() or 2.0)
    results = {**made_up(), "skipped": []}
    timer = timing.Timer(torch.device("cpu"))
    results["ceilings"] = timing.ceilings(timer)
    for name, _, task in gpu.tasks(results, module("gpu_sizes").DRY, timer):
        if "model" not in name:
            task()
    gpu.save(results, tmp_path)
    assert gpu.main(["--page", str(tmp_path / "nvidia-made-up.json")], tmp_path) == 0
    page = (tmp_path / "gpu.md").read_text()
    assert "| 192 | 2 | 10.0 (dense) | 10.0 (1.00×) |" in page
    assert "| 2 | clusterkv 4 | 10.0 | 0.0 |" in page and "-40.0" in page  # five parts in a step as long as each


def made_up():
    """A result file of two lengths, in round numbers."""
    part = {"us": 10.0, "bytes": 8_000_000, "of_copy": 0.8}
    times = {"us": 40.0, "low": 39.0, "high": 41.0, "bytes": 1_000_000, "of_copy": 0.25, "of_read": 0.2}
    parts = {"append": {"us": 2.0}, "score": part, "select": {"us": 20.0}, "attend": part}
    rows = []
    for length, batch in ((131072, 1), (131072, 8), (8192, 1), (8192, 8)):
        place = {"length": length, "batch": batch, "copies": 3}
        rows += [
            {
                **place,
                "method": "dense",
                "ours": True,
                "dense": True,
                **times,
                "us": 120.0,
                "parts": parts,
                "rest_us": 1.0,
            },
            {**place, "method": "loki, int4", "ours": True, "dense": False, **times, "parts": parts, "rest_us": 1.0},
            {
                **place,
                "method": "spectral, int2",
                "ours": True,
                "dense": False,
                **times,
                "parts": parts,
                "rest_us": 1.0,
            },
            {**place, "method": "SDPA flash", "ours": False, "dense": True, **times, "us": 100.0},
            {**place, "method": "FlashInfer", "ours": False, "dense": True, "failed": "No module named 'flashinfer'"},
        ]
    selected = {"length": 131072, "batch": 1, "keep": 2048, "select": {"us": 20.0}, "select_threshold": {}, "topk": {}}
    model = {"length": 131072, "batch": 1, "why_not_captured": None, "cache_bytes": 16e9, "tokens_per_s": 50.0}
    return {
        "machine": dict.fromkeys(("driver", "torch", "triton", "transformers"), "1.0") | {"gpu": "NVIDIA Made Up"},
        "commit": "abc",
        "gate": [{}] * 70,
        "ceilings": {"copy": 4000.0, "read": 4200.0},
        "attention": rows,
        "selection": [selected],
        "model": [{**model, "method": "full", "ms": 20.0}, {**model, "method": "loki", "ms": 8.0}],
        "build": [
            {
                "length": 8192,
                "per_cluster": 80,
                "calibrated": False,
                "passes": 9,
                "build_ms": 1,
                "prefill_ms": 2,
                "ratio": 0.5,
            }
        ],
        "skipped": ["flex attention of 131072 tokens, batch 8"],
    }


def test_the_page(module, tmp_path):
    module("gpu_page").write([made_up()], tmp_path)
    page = (tmp_path / "gpu.md").read_text()
    assert (tmp_path / "gpu-nvidia-made-up.png").read_bytes().startswith(
        b"\x89PNG"
    ) and "(gpu-nvidia-made-up.png)" in page
    assert "| 131072 | 8 | 100.0 (SDPA flash) | 120.0 (0.83×) | 40.0 (2.50×) | 40.0 (2.50×) |" in page
    assert "score 10.0 (80%)" in page
    assert "- FlashInfer: No module named 'flashinfer'" in page
    assert "- spectral, int2, batch 8: 2.50× the fastest dense step (SDPA flash), target 8×." in page
    assert "- spectral, int2, batch 1: 2.50× the fastest dense step (SDPA flash), target 4×." in page
    assert "- Loki int4, batch 8: 2.50× the fastest dense step (SDPA flash), target 4×." in page
    assert "- select, batch 1: 0.20 of the fastest dense step, target 0.25." in page
    assert "| 131072 | 1 | loki | 8.00 | 50 | 2.50 | 16.0 |" in page
    assert "Not measured: flex attention of 131072 tokens, batch 8." in page
