"""The page of benchmarks/real: what was measured is shown, what was not is left out."""

import dataclasses
import json
import math

import pytest
import torch

ROW = {"perplexity_ratio": 1.5, "perplexity_ratio_se": 0.25, "scores": {"passkey": 0.5}, "scores_se": {"passkey": 0.1}}
FULL = {**ROW, "method": "full", "perplexity_ratio": 1.0, "resident_bytes": 40.0, "bytes_per_step": 40.0}


@pytest.fixture
def subject(module):
    return dataclasses.replace(module("subjects").SUBJECTS["smollm2-135m"], model="m")


def written(folder, part, *rows):
    (folder / f"m-{part}.json").write_text(json.dumps({"settings": {"dtype": "float32"}, "results": rows}))


def test_trainings_are_shown_by_tokens_with_the_exponent_of_their_loss(module, tmp_path, subject):
    """Half of the nats for four times the tokens is an exponent of -1/2, surely so where every window says it. What was
    interrupted is left out; where nothing is lost there is none."""
    page = module("page_sharing")
    full = {**FULL, "window_nll": [3.0, 2.0]}
    cla = {**ROW, "method": "cla", "resident_bytes": 20.0, "bytes_per_step": 40.0}
    written(tmp_path, "uptraining-4000", full, {**cla, "window_nll": [3.15, 2.25]})
    written(tmp_path, "uptraining-1000", full, {**cla, "window_nll": [3.3, 2.5]})
    written(tmp_path, "uptraining-16000", full)
    lines = page.uptraining(tmp_path, subject).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| 1000", "| 4000"]
    assert "| 0.400 ± .100 | – | 0.50 ± .10 |" in lines[0] and "| 0.200 ± .050 | -0.50 ± .00 |" in lines[1]
    written(tmp_path, "uptraining-16000", full, {**cla, "window_nll": [2.9, 2.0]})
    assert "| -0.050 ± .050 | – |" in page.uptraining(tmp_path, subject)


def test_the_error_of_an_exponent_is_that_of_many_repetitions(module):
    """Of windows drawn anew 400 times, whose losses have a part in common."""
    exponent, generator = module("page_sharing").exponent, torch.Generator().manual_seed(0)
    found = []
    for _ in range(400):
        common, own, other = torch.randn(3, 40, generator=generator)
        first, last = 1 + 0.2 * common + 0.1 * own, 0.5 + 0.1 * common + 0.1 * other
        found.append(exponent((100, first.tolist()), (1000, last.tolist())))
    exponents, errors = torch.tensor(found, dtype=torch.float64).T
    assert float(exponents.mean()) == pytest.approx(math.log10(0.5), abs=0.01)
    assert float(errors.mean()) == pytest.approx(float(exponents.std()), rel=0.12)


def test_patterns_are_shown_with_what_was_measured_of_them(module, tmp_path, subject):
    page, sharing = module("page_sharing"), module("sharing")
    cla = {**ROW, "resident_bytes": 20.0, "bytes_per_step": 40.0}
    mean = {**cla, **sharing.MEAN, "perplexity_ratio": 200.0, "perplexity_ratio_se": 30.0}
    written(tmp_path, "sharing-uniform", FULL, {**cla, **sharing.FITTED})
    written(tmp_path, "mean-uniform", FULL, {**mean, "scores": {}})
    written(tmp_path, "sharing-keep-ends", FULL, mean)
    written(tmp_path, "sharing-auto", FULL)
    assert page.sharing(tmp_path, subject).splitlines()[2:] == [
        "| keep-ends | 0.500 | mean | 200 ± 30 | 0.50 ± .10 |",
        "| uniform | 0.500 | fitted | 1.500 ± .250 | 0.50 ± .10 |",
        "| uniform | the same | mean | 200 ± 30 | – |",
    ]


def test_the_figure_has_what_is_held_with_sharing(module, tmp_path, subject):
    """Of the pattern that was trained: fitted, and after the longest training; each over the whole cache."""
    figure = module("figure")
    cla = {**ROW, "method": "cla", "resident_bytes": 20.0, "bytes_per_step": 40.0}
    written(tmp_path, "sharing-keep-ends", FULL, cla)
    written(tmp_path, "uptraining-1000", FULL, {**cla, "perplexity_ratio": 1.2})
    written(tmp_path, "uptraining-4000", FULL)
    rows = [
        (row["method"], row["perplexity_ratio"], row["resident_bytes"]) for row in figure._of_sharing(tmp_path, subject)
    ]
    assert rows == [("cla, fitted", 1.5, 0.5), ("cla, trained", 1.2, 0.5)]


def test_codes_are_compared_with_each_layer_by_itself(module, tmp_path, subject):
    """Bytes over those of a 16-bit cache, half of what `full` holds in float32; windows paired."""
    page = module("page_sharing")
    full = {**FULL, "resident_bytes": 80.0, "bytes_per_step": 80.0}
    coded = {**ROW, "method": "xcla", "resident_bytes": 8.0, "bytes_per_step": 16.0}
    written(tmp_path, "xcla-3-0.17", full, {**coded, "window_nll": [2.0, 3.0]})
    written(tmp_path, "xcla-1-0.17", full, {**coded, "window_nll": [2.5, 3.1]})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.xcla(tmp_path, subject).splitlines()[2:]]
    assert [row[1:5] for row in rows] == [["3", "0.17", "0.200", "0.400"], ["1", "0.17", "0.200", "0.400"]]
    assert rows[0][6] == "-0.300 ± .200" and rows[1][6] == ""


def test_pages_without_measurements_are_empty(module, tmp_path, subject):
    page = module("page")
    for name in (
        "sharing",
        "uptraining",
        "shared-basis-text",
        "group-errors",
        "xcla",
        "clusterable",
        "estimates",
        "lines",
    ):
        assert page.PARTS[name][1](tmp_path, subject) == ""
