"""benchmarks/cpu.py: everything that it compares computes the same attention, and its page names all of it."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"
LENGTH = 300


@pytest.fixture
def module(monkeypatch):
    """Imports one of its files, which find one another as scripts do; others have files of the same names."""
    for folder in (FOLDER, FOLDER / "gpu"):
        monkeypatch.syspath_prepend(str(folder))
    names = {path.stem for folder in (FOLDER, FOLDER / "gpu") for path in folder.glob("*.py")}
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(before)


@torch.no_grad()
def test_baselines_are_what_is_compared(module):
    cpu, sizes = module("cpu"), module("sizes").DRY
    copy = module("caches").draw(sizes, 1, LENGTH, torch.device("cpu"))
    outs = [out().flatten().float() for out in cpu.baselines(copy, sizes).values()]
    for name, store in cpu.stores(copy, sizes).items():
        out = store.attend(copy.query, cpu.SoftmaxSpec(sizes.scaling)).flatten().float()
        if name == "full":
            outs.append(out)
        else:
            assert float((out - outs[0]).norm() / outs[0].norm()) < 1, name
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=2e-2, atol=2e-2)  # bfloat16


def test_its_page_names_all_of_it(module, monkeypatch, tmp_path):
    cpu, page, sizes = module("cpu"), module("cpu_page"), module("sizes").DRY
    monkeypatch.setattr(cpu, "ROUNDS", 2)
    monkeypatch.setattr(cpu, "EMPTIED", 1024)
    found = {"machine": {**cpu.machine(), "numba": "1"}, "attention": {"tiny": {"300": cpu.attention(sizes, LENGTH)}}}
    page.write(tmp_path / "cpu.md", found)
    written = (tmp_path / "cpu.md").read_text()
    for name in (*page.TORCH, "full", *cpu.SPECTRAL):
        assert f"| {name} | " in written
    assert written.count("×") == 2 * (1 + len(cpu.SPECTRAL))
