"""benchmarks/cpu.py: everything that it compares computes the same attention, and its page names all of it."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compressed import CLOSE, artifact, model, random_ids

from kvcal.runtime import CompressedCache

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


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@torch.no_grad()
def test_steps_of_a_model(module, monkeypatch, tmp_path, name):
    """transformers' cache has the same tokens, those of sliding windows, too; the page has what was measured."""
    cpu, steps, page, of = module("cpu"), module("cpu_model"), module("cpu_page"), model(name)
    full, ids = CompressedCache(of, None, "full"), random_ids(41)
    of(ids[:, :40], past_key_values=full)
    plain = steps.of_transformers(full, of.config)
    torch.testing.assert_close(of(ids[:, 40:], past_key_values=plain).logits, of(ids).logits[:, 40:], **CLOSE)

    for name_of, value in (("ROUNDS", 2), ("EMPTIED", 1024)):
        monkeypatch.setattr(cpu, name_of, value)
    monkeypatch.setattr(steps, "load_model", lambda *_, **settings: SimpleNamespace(model=of, tokenizer=None))
    monkeypatch.setattr(steps, "load", lambda folder: artifact(name))
    monkeypatch.setattr(steps, "tokens", lambda loaded, count: random_ids(count))
    monkeypatch.setattr(steps, "METHODS", {"full": ("full", {}), "loki": ("loki", {"keep": 0.5})})
    lengths = {
        str(length): steps.steps("", tmp_path, "float32", length, with_first)
        for length, with_first in ((40, False), (20, True))
    }
    assert set(lengths["20"]["ms"]) == set(lengths["20"]["first_ms"]) == {"transformers", "full", "loki"}
    page.write(tmp_path / "cpu.md", {"machine": {**cpu.machine(), "numba": "1"}, "model": {name: lengths}})
    written = (tmp_path / "cpu.md").read_text()
    assert written.count("×") == 2 * 2 * 3 and written.count("first token, ") == 3
