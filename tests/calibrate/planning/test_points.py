"""What a plan measures, against formulas."""

from __future__ import annotations

import coded
import pytest
import torch

from kvcal.calibrate.planning import points
from kvcal.calibrate.planning.points import Problem, alike, measure
from kvcal.calibrate.planning.settings import grid
from kvcal.runtime.attention import SoftmaxSpec

TOKENS, STEPS, SCALING = 40, 3, 0.25


def problem(texts: int = 2) -> Problem:
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(3, 4, TOKENS, 16, generator=draw)
    key, value = (torch.randn(3, 2, TOKENS, 16, generator=draw) for _ in range(2))
    return Problem(0, query[:, :, -STEPS:], key, value, SoftmaxSpec(SCALING), texts)


def top_errors(of: Problem, keep: int) -> torch.Tensor:
    """[B, steps, Hq] relative error of attention to the `keep` largest logits of each query alone, in float64."""
    found = torch.zeros(3, STEPS, 4, dtype=torch.float64)
    for row in range(3):
        for step, at in enumerate(range(TOKENS - STEPS, TOKENS)):
            for head in range(4):
                keys, values = (each[row, head // 2, : at + 1].double() for each in (of.key, of.value))
                logits = keys @ of.query[row, head, step].double() * SCALING
                best = logits.topk(keep).indices
                dense = logits.softmax(0) @ values
                found[row, step, head] = (logits[best].softmax(0) @ values[best] - dense).norm() / dense.norm()
    return found


def test_errors_are_those_of_the_formula_over_rows_of_text():
    of = problem()
    errors = top_errors(of, 5)
    point = of.measure({"method": "exact_topk", "select": "head", "keep": 5}, None, 3)
    assert point.error == pytest.approx(float(errors[:2].mean()), rel=1e-4)
    by_head = errors[:2].unflatten(2, (2, 2)).mean((0, 1, 3))
    assert point.head_errors == pytest.approx(by_head.tolist(), rel=1e-4)
    assert point.text_errors == pytest.approx(errors[:2].mean((1, 2)).tolist(), rel=1e-4)


def test_loss_is_half_of_text_and_half_of_questions():
    of = problem()
    squares = top_errors(of, 5).square()
    expected = 0.5 * float(squares[:2].mean()) + 0.5 * float(squares[2:].mean())
    assert of.measure({"method": "exact_topk", "select": "head", "keep": 5}, None, 3).loss == pytest.approx(
        expected, rel=1e-4
    )
    only_text = problem(texts=3).measure({"method": "exact_topk", "select": "head", "keep": 5}, None, 3)
    assert only_text.loss == pytest.approx(float(squares.mean()), rel=1e-4)


def test_bytes_are_over_those_of_dense_attention():
    full = problem().measure({"method": "full"}, None, 3)
    assert full.bytes == 1.0 and full.error < 1e-6 and full.loss < 1e-12
    top = problem().measure({"method": "exact_topk", "keep": 10, "select": "group"}, None, 3)
    lengths = range(TOKENS - STEPS + 1, TOKENS + 1)
    # Every key, then the values of ten tokens; keys and values are of the same width.
    assert top.bytes == pytest.approx(sum(length + 10 for length in lengths) / (2 * sum(lengths)), rel=1e-6)


def test_what_rows_share_is_counted_by_the_batch_size():
    """Loki's map [2 heads, 16, 16] of float32, read once per step for all rows."""
    artifact = coded.artifact(16, 2)
    alone, together = (
        problem().measure({"method": "loki", "basis": "pca", "select": "head", "keep": 5}, artifact, rows).bytes
        for rows in (1, 4)
    )
    dense = sum(range(TOKENS - STEPS + 1, TOKENS + 1)) / STEPS * 2 * 32 * 4
    assert alone - together == pytest.approx((1 - 1 / 4) * 2 * 16 * 16 * 4 / dense, rel=1e-6)


def test_one_store_serves_settings_that_keep_the_same():
    """Bytes and errors are those of a store of its own for each, and what is kept is made once per code."""
    of, artifact = problem(), coded.artifact(16, 2)
    settings = grid("spectral", 16)
    groups = [[settings[at] for at in group] for group in alike(settings)]
    assert [{(of["rank"], of["bits"]) for of in group} for group in groups] == [{(16, 2)}, {(16, 4)}]
    together = measure(of, settings, artifact, torch.device("cpu"), 4)
    for setting, point in zip(settings, together, strict=True):
        own = of.measure(setting, artifact, 4)
        assert point.setting == setting and (point.bytes, point.error) == (own.bytes, own.error)
        assert point.loss == own.loss and point.head_errors == own.head_errors


def test_other_methods_have_a_store_for_each_setting():
    """Of clusters, whose windows `keep` bounds; and where it does not, one store for all."""
    clusters = [{"method": "clusterkv", "keep": keep, "tokens_per_cluster": 3, "sinks": 1} for keep in (3, 5)]
    assert alike(clusters) == [[0], [1]]
    assert alike([{"method": "loki", "keep": keep} for keep in (3, 5)]) == [[0, 1]]
    found = measure(problem(), clusters, coded.artifact(16, 2), torch.device("cpu"), 4)
    assert found[0].bytes < found[1].bytes


def test_dense_attention_is_computed_once_for_all_settings(monkeypatch):
    counted = []
    dense = points.probabilities
    monkeypatch.setattr(points, "probabilities", lambda *args: counted.append(0) or dense(*args))
    measure(problem(), grid("spectral", 16), coded.artifact(16, 2), torch.device("cpu"), 4)
    assert len(counted) == STEPS
