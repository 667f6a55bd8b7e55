"""Runs of benchmarks/gpu with made-up workers: what faults, hangs or is late spoils no other row, and all is saved."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
WORKER = """
import json, os, subprocess, sys, time
from pathlib import Path
for line in sys.argv[2:] or sys.stdin:
    row = json.loads(line)
    do, out = row.get("do"), Path(os.environ["OUT"])
    if do == "fault":
        print("CUDA error: an illegal memory access"); os._exit(134)
    if do == "hang":
        (out / "child").write_text(str(subprocess.Popen(["sleep", "600"]).pid))
        time.sleep(600)
    if do == "meet":  # returns only when all of them run at once
        (out / f"here-{row['number']}").touch()
        while len(list(out.glob("here-*"))) < row["of"]:
            time.sleep(0.01)
    saved = out / "test.json"
    row |= {"pid": os.getpid(), "saved": len(json.loads(saved.read_text())["rows"]) if saved.exists() else 0}
    print("a library's remark")
    print("ROW " + json.dumps(row | row.get("says", {}) | ({"restart": True} if do == "broken" else {})), flush=True)
"""


@pytest.fixture
def run(module, tmp_path, monkeypatch):
    """(a run of so many seconds, its module), with made-up workers, in dry sizes but with a GPU's times."""
    monkeypatch.setenv("OUT", str(tmp_path))
    of = module("run")
    monkeypatch.setattr(of, "DRY_TIMES", 1)
    made = []

    def begin(seconds=60.0, name="test"):
        made.append(of.Run(name, tmp_path, True, seconds, [sys.executable, "-S", "-c", WORKER], {"commit": "abc"}))
        return made[-1]

    yield begin
    for each in made:
        each.close()


def do(*whats, **more):
    return [{"kind": "eager", "do": what, "number": number, **more} for number, what in enumerate(whats)]


def phase(module, rows, **options):
    return module("run").Phase("phase", rows, **{"most": 60, "needs": 0, **options})


def saved(tmp_path, name="test"):
    return json.loads((tmp_path / f"{name}.json").read_text())["rows"]


def test_a_fault_spoils_its_own_row_only(run, module, tmp_path):
    run().go([phase(module, do("ok", "fault", "ok", "broken", "ok"))])
    first, fault, second, broken, third = saved(tmp_path)
    assert fault["failed"] == "its process ended with 134: CUDA error: an illegal memory access"
    assert [row["number"] for row in saved(tmp_path)] == [0, 1, 2, 3, 4]
    assert not any("failed" in row for row in (first, second, broken, third))
    assert len({first["pid"], second["pid"], third["pid"]}) == 3 and second["pid"] == broken["pid"]


def test_what_hangs_is_killed_with_its_children(run, module, tmp_path):
    run().go([phase(module, do("hang", "ok"), limit=1)])
    hung, after = saved(tmp_path)
    assert hung["failed"] == "it took more than 1 s and was stopped" and "failed" not in after
    child = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_everything_is_saved_before_the_next_row(run, module, tmp_path):
    run().go([phase(module, do("ok", "ok")), phase(module, do("ok", "fault", "ok"), fresh=True)])
    assert [row.get("saved") for row in saved(tmp_path)] == [0, 1, 2, None, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.json", "test.log"]
    assert "a library's remark" in (tmp_path / "test.log").read_text()


def test_checks_run_at_once(run, module, tmp_path):
    run().go([phase(module, do(*["meet"] * 4, of=4), fresh=True, at_once=4)])
    assert sorted(row["number"] for row in saved(tmp_path)) == [0, 1, 2, 3]
    assert not any("failed" in row for row in saved(tmp_path))


def test_later_phases_have_their_time(run, module, tmp_path):
    """The first would take all of the twenty seconds."""
    phases = [phase(module, do("hang", "ok"), needs=1), phase(module, do("ok"), kept=18)]
    run(20.0).go(phases)
    hung, late, kept = saved(tmp_path)
    assert "was stopped" in hung["failed"] and late["skipped"] == "no time left" and "pid" in kept


def test_what_time_does_not_suffice_for_is_skipped_by_name(run, module, tmp_path):
    run(0.0).go([phase(module, [{"kind": "step", "method": "dense", "length": 8, "batch": 1}], needs=5)])
    assert saved(tmp_path)[0]["skipped"] == "no time left"
    assert (
        "step dense, 8 tokens, batch 1: expected 7.5 µs (3 launches, 0.0 MB); skipped: no time left"
        in (tmp_path / "test.log").read_text()
    )


def test_rows_say_which_checks_they_lack(run, module, tmp_path):
    """In the same run and in another one that writes into the same folder."""
    checks = [
        {"kind": "check", "check": name, "says": {"passed": passed}}
        for name, passed in (("append", True), ("dense", True), ("score", False), ("step dense", True))
    ]
    step = {"kind": "step", "length": 64, "batch": 1}
    steps = [{**step, "method": "dense"}, {**step, "method": "loki"}]
    run().go([phase(module, [*checks, *steps])])
    run(name="other").go([phase(module, [{"kind": "model", "method": "full", "length": 64, "batch": 1}, steps[1]])])
    lacking = ["score", "select", "attend", "step loki"]
    assert [row.get("unproven") for row in saved(tmp_path)[4:]] == [None, lacking]
    assert [row.get("unproven") for row in saved(tmp_path, "other")] == [None, lacking]
    assert "UNPROVEN: score, select" in (tmp_path / "test.log").read_text()


def test_a_run_that_is_ended_leaves_what_it_has(module, tmp_path):
    """And no process."""
    script = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from benchmarks.gpu import command; from benchmarks.gpu.run import Phase
command.WORKER = [sys.executable, "-S", "-c", {WORKER!r}]
rows = [{{"kind": "eager", "do": what}} for what in ("ok", "hang")]
command.RUNS["test"] = (1, lambda sizes: [Phase("", rows, most=60, at_once=2)])
command.main("", ["test", {str(tmp_path)!r}, "--dry"])
"""
    environment = {**os.environ, "OUT": str(tmp_path)}
    running = subprocess.Popen([sys.executable, "-S", "-c", script], env=environment, stdout=subprocess.DEVNULL)
    child = tmp_path / "child"
    while not child.exists() or not child.read_text() or len(saved(tmp_path)) < 2:
        assert running.poll() is None
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    assert running.wait(30) == 143
    assert [row["kind"] for row in saved(tmp_path)] == ["machine", "eager"]
    stat = Path(f"/proc/{child.read_text()}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_results_are_not_written_over(module, tmp_path, capsys):
    (tmp_path / "first.json").write_text("{}")
    assert module("command").main("", ["first", str(tmp_path), "--dry"]) == 2
    assert "holds results of this run already" in capsys.readouterr().err
    assert (tmp_path / "first.json").read_text() == "{}" and len(list(tmp_path.iterdir())) == 1


def test_saving_is_all_or_nothing(module, tmp_path, monkeypatch):
    path = tmp_path / "first.json"
    module("results").save({"rows": [1]}, path)
    monkeypatch.setattr(Path, "write_text", lambda self, text: self.write_bytes(text[:3].encode()) and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        module("results").save({"rows": [2]}, path)
    assert json.loads(path.read_text()) == {"rows": [1]}


def test_tools_that_are_missing_are_noted(run, module, tmp_path, monkeypatch):
    monkeypatch.setattr(module("tools"), "find", lambda tool: None)
    counters = {"kind": "counters", "method": "loki", "length": 64, "batch": 8}
    begun = run()
    begun.go([phase(module, [counters, {"kind": "sanitizer", "check": "select"}], fresh=True)])
    begun.dry = False  # on a GPU nothing is run for them
    begun.go([phase(module, [counters], fresh=True)])
    dry, sanitizer, skipped = saved(tmp_path)
    assert dry["note"] == "ncu was not found" and "pid" in dry and dry["kind"] == "counters"
    assert sanitizer["note"] == "compute-sanitizer was not found" and sanitizer["small"]
    assert skipped["skipped"] == "ncu was not found" and "pid" not in skipped


def test_tools_stand_before_the_worker(module, tmp_path):
    sizes = module("sizes").FULL
    counters = {"kind": "counters", "method": "loki, own index", "length": 131072, "batch": 8}
    tool, arguments, measured = module("tools").watched(counters, sizes, tmp_path)
    assert tool == "ncu" and measured == {**counters, "kind": "eager"}
    assert arguments[-4:] == ["--launch-skip", "10", "-c", "5"]  # five launches, of the last of three steps
    assert arguments[:2] == ["--clock-control", "none"] and str(tmp_path / "ncu-lokiownindex-8.csv") in arguments
    tool, arguments, measured = module("tools").watched({"kind": "sanitizer", "check": "select"}, sizes, tmp_path)
    assert tool == "compute-sanitizer" and measured == {"kind": "check", "check": "select", "small": True}


def test_what_tools_say(module, tmp_path):
    tools = module("tools")
    sanitizer = {"kind": "sanitizer", "check": "select"}
    clean, errors = (["ROW {}", f"========= ERROR SUMMARY: {count} errors"] for count in (0, 3))
    assert tools.seen(sanitizer, tmp_path, 0, clean) == {"passed": True, "note": "ERROR SUMMARY: 0 errors"}
    assert not tools.seen(sanitizer, tmp_path, 9, errors)["passed"]
    assert not tools.seen(sanitizer, tmp_path, None, [])["passed"]
    counters = {"kind": "counters", "method": "loki", "batch": 8}
    assert (
        "ncu wrote nothing; it ended with 1: no permission"
        in tools.seen(counters, tmp_path, 1, ["no permission"])["failed"]
    )
    (tmp_path / "ncu-loki-8.csv").write_text(
        '==PROF== Connected\n"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","score_kernel","Duration","us","21.5"\n"0","score_kernel","Waves Per SM","","3"\n'
        '"1","select_kernel","Duration","us","19"\n"0","score_kernel","DRAM Throughput","%","81.2"\n'
    )
    assert tools.seen(counters, tmp_path, 0, [])["counters"] == [
        {"kernel": "score_kernel", "Duration": "21.5 us", "DRAM Throughput": "81.2 %"},
        {"kernel": "select_kernel", "Duration": "19 us"},
    ]


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU")
def test_without_a_gpu(module, tmp_path, capfd):
    """Through the real worker, from the repository's root, with nothing on the path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "first", str(tmp_path / "out")], env=environment, cwd=ROOT
    )
    assert done.returncode == 2
    assert "error: no GPU that works: " in capfd.readouterr().err
    assert not list((tmp_path / "out").glob("*.json"))


def test_it_needs_no_installation():
    """Nor writes one: an interpreter without site-packages finds the tree's folders, another kvcal or not."""
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from benchmarks.gpu import tree
import kvcal
from importlib.util import find_spec
print(*kvcal.__path__, find_spec("kvcal.kernels.backend") is not None, find_spec("kvcal.calibrate") is not None)
from benchmarks.gpu import first, second
print(sorted(name for name in sys.modules if name.partition(".")[0] in ("torch", "numpy", "click")))
"""
    # kvcal.calibrate's parent is a namespace: finding it runs nothing.
    said = subprocess.run([sys.executable, "-S", "-I", "-c", code], capture_output=True, text=True)
    assert said.stdout.splitlines() == [f"{ROOT} True True", "[]"], said.stderr
