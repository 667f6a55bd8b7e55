"""benchmarks/cpu: everything that it compares computes the same attention, and its page names all of it."""

import json
from types import SimpleNamespace

import pytest
import torch
from compressed import CLOSE, artifact, model, random_ids

from benchmarks.cpu import attention as cpu
from benchmarks.cpu import model as steps
from benchmarks.cpu import page, turns
from benchmarks.gpu.caches import draw
from benchmarks.gpu.sizes import DRY
from benchmarks.shared.measure import machine
from kvcal.runtime import CompressedCache

LENGTH = 300


@torch.no_grad()
def test_baselines_are_what_is_compared():
    sizes = DRY
    copy = draw(sizes, 1, LENGTH, torch.device("cpu"))
    outs = [out().flatten().float() for out in cpu.baselines(copy, sizes).values()]
    for name, store in cpu.stores(copy, sizes).items():
        out = store.attend(copy.query, cpu.SoftmaxSpec(sizes.scaling)).flatten().float()
        if name == "full":
            outs.append(out)
        else:
            assert float((out - outs[0]).norm() / outs[0].norm()) < 1, name
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=2e-2, atol=2e-2)  # bfloat16


def written_of(found, tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "decoding.json").write_text(json.dumps({"machine": {**machine(), "numba": "1"}, **found}))
    return page.PAGE.text(tmp_path).partition("\n## ")[2]


def test_its_page_names_all_of_it(monkeypatch, tmp_path):
    monkeypatch.setattr(turns, "ROUNDS", 2)
    monkeypatch.setattr(turns, "EMPTIED", 1024)
    written = written_of({"attention": {"tiny": {"300": cpu.attention(DRY, LENGTH)}}}, tmp_path)
    for name in (*page.TORCH, "full", *cpu.SPECTRAL):
        assert f"| {name} | " in written
    assert written.count("×") == 2 * (1 + len(cpu.SPECTRAL))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@torch.no_grad()
def test_steps_of_a_model(monkeypatch, tmp_path, name):
    """transformers' cache has the same tokens, those of sliding windows, too; the page has what was measured."""
    of = model(name)
    full, ids = CompressedCache(of, None, "full"), random_ids(41)
    of(ids[:, :40], past_key_values=full)
    plain = steps.of_transformers(full, of.config)
    torch.testing.assert_close(of(ids[:, 40:], past_key_values=plain).logits, of(ids).logits[:, 40:], **CLOSE)

    for name_of, value in (("ROUNDS", 2), ("EMPTIED", 1024)):
        monkeypatch.setattr(turns, name_of, value)
    monkeypatch.setattr(steps, "load_model", lambda *_, **settings: SimpleNamespace(model=of, tokenizer=None))
    monkeypatch.setattr(steps, "load", lambda folder: artifact(name))
    monkeypatch.setattr(steps, "tokens", lambda loaded, count: random_ids(count))
    monkeypatch.setattr(steps, "METHODS", {"full": ("full", {}), "loki": ("loki", {"keep": 0.5})})
    lengths = {
        str(length): steps.steps("", tmp_path, "float32", length, with_first)
        for length, with_first in ((40, False), (20, True))
    }
    assert set(lengths["20"]["ms"]) == set(lengths["20"]["first_ms"]) == {"transformers", "full", "loki"}
    written = written_of({"model": {name: lengths}}, tmp_path)
    assert written.count("×") == 2 * 2 * 3 and written.count("first token, ") == 3
