"""Divergence of next-token distributions: its formula, what decodes, and what is not decoded twice."""

from __future__ import annotations

import pytest
import torch
from compressed import artifact, model

from kvcal.calibrate.planning import divergence as module
from kvcal.calibrate.planning.divergence import Decoder, divergences
from kvcal.calibrate.planning.kept import Kept
from kvcal.calibrate.planning.prompts import PlanningRows
from kvcal.calibrate.planning.subject import Subject
from kvcal.runtime import CompressedCache

STEPS, LENGTH = 3, 24
SETTING = {"method": "exact_topk", "keep": 3, "select": "head"}
ALONE = [None, SETTING, None]


def rows(texts: int = 2) -> PlanningRows:
    ids = torch.randint(3, 90, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    return PlanningRows(ids, STEPS, texts)


def decoder(kept: Kept | None = None, name: str = "llama", texts: int = 2) -> Decoder:
    return Decoder(Subject(model(name), artifact(name), kept=kept or Kept()), rows(texts))


def test_the_formula():
    """Σ p log(p / q) of (½, ¼, ¼) and (¼, ¼, ½)."""
    p, q = (torch.tensor(of).log() for of in ([0.5, 0.25, 0.25], [0.25, 0.25, 0.5]))
    assert float(divergences(p, q)) == pytest.approx(0.25 * float(torch.tensor(2.0).log()), rel=1e-6)
    assert float(divergences(p, p)) == 0


@torch.no_grad()
def expected(name: str, method: list) -> torch.Tensor:
    """[B] of whole rows, one by one and without a decoder."""
    found = []
    for row in rows().ids:
        cache = CompressedCache(model(name), artifact(name), method)
        model(name)(row[None, : LENGTH - STEPS], past_key_values=cache, use_cache=True)
        ours = [
            model(name)(row[None, at : at + 1], past_key_values=cache, use_cache=True).logits[0, -1].softmax(-1)
            for at in range(LENGTH - STEPS, LENGTH)
        ]
        full = model(name)(row[None]).logits[0, -STEPS:].softmax(-1)
        found.append(sum(float((p * (p / q).log()).sum()) for p, q in zip(full, ours, strict=True)) / STEPS)
    return torch.tensor(found)


@pytest.mark.parametrize("name", ["llama", "gemma2"], ids=["full layers", "and sliding ones"])
def test_it_is_that_of_rows_decoded_alone(name):
    at = next(iter(CompressedCache(model(name), None, "full").stores))
    alone = [SETTING if layer == at else None for layer in range(3)]
    by_row = expected(name, [each or {"method": "full"} for each in alone])
    (found,) = decoder(name=name).divergence([alone])
    assert found > 1e-6
    assert found == pytest.approx(float((by_row[:2].mean() + by_row[2]) / 2), rel=1e-3, abs=1e-6)
    (text,) = decoder(name=name, texts=3).divergence([alone])
    assert text == pytest.approx(float(by_row.mean()), rel=1e-3, abs=1e-6)


def test_full_attention_diverges_by_nothing():
    assert decoder().divergence([[None] * 3]) == [0.0]


def test_nothing_is_decoded_twice(monkeypatch):
    kept = Kept()
    both = [ALONE, [SETTING, None, None]]
    first = decoder(kept).divergence(both)
    assert first[0] != first[1]
    monkeypatch.setattr(module, "CompressedCache", None)
    assert decoder(kept).divergence([*both, ALONE]) == [*first, first[0]]


def test_what_was_decoded_before_a_kill_is_kept(monkeypatch):
    kept = Kept()

    def killed(done: int, total: int) -> None:
        assert (done, total) == (1, 2)
        raise KeyboardInterrupt

    both = [ALONE, [SETTING, None, None]]
    with pytest.raises(KeyboardInterrupt):
        decoder(kept).divergence(both, killed)
    asked: list[tuple[int, int]] = []
    resumed = decoder(kept).divergence(both, lambda done, total: asked.append((done, total)))
    assert asked == [(1, 1)] and resumed == decoder().divergence(both)
