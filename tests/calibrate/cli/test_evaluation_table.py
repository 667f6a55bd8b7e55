"""Tables of few tasks and of many."""

from __future__ import annotations

import re
from typing import Any

from kvcal.calibrate.cli.evaluation_table import by_length, print_results

SETTINGS = {"model": "m", "prefix": 64, "continuation": 8, "batch_size": 2, "question": "prefilled"}
RULER = [f"niah_single_{number}" for number in (1, 2, 3)] + ["vt", "cwe", "fwe", "qa_1", "qa_2"]


def row(method: str, scores: dict[str, float], **more: Any) -> dict[str, Any]:
    found = {"method": method, "bytes_per_step": 4e6, "resident_bytes": 5e6, "ms_per_step": 1.0}
    ones = dict.fromkeys(scores, 0.05)
    return {**found, "scores": scores, "scores_se": ones, "relative": dict(scores), "relative_se": ones, **more}


def test_standard_errors_and_parts_of_full(capsys):
    perplexity = {"perplexity": 10.0, "perplexity_ratio": 1.0, "perplexity_ratio_se": 0.0}
    full = row("full", {"passkey@64": 0.8}, **perplexity)
    loki = row("loki", {"passkey@64": 0.6}, relative={"passkey@64": 0.75}, keep=0.25, **perplexity)
    loki |= {"perplexity_ratio": 1.0234, "perplexity_ratio_se": 0.0071}
    print_results(SETTINGS, [full, loki])
    out = capsys.readouterr().out
    assert "questions prefilled" in out
    assert "0.80±.05" in out and "0.60±.05 /.75" in out and "1.023±.007" in out and "1.000±" not in out
    assert "full itself scores below 0.9: passkey@64 0.80: read scores relative to full's" in out


def test_many_tasks_stand_in_tables_by_length_with_the_mean_of_rulers(capsys):
    tasks = [f"{name}@{length}" for length in (4096, 16384) for name in (*RULER, "passkey")]
    full = row("full", {task: 0.8 if task.startswith("vt") else 1.0 for task in tasks})
    h2o = row("h2o", {task: 0.5 if task.startswith("niah") else 0.75 for task in tasks}, keep=0.25)
    print_results(SETTINGS, [full, h2o])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 120
    tables = out.split("m: questions prefilled")[1:]
    assert len(tables) == 5  # two for each length, one of costs
    for table, length in zip(tables, (4096, 4096, 16384, 16384), strict=False):
        assert f"@{length}" in table and "h2o" in table
    # (3 · 0.5 + 5 · 0.75) / 8 ± 0.05 / √8, passkey left out; of full's 7.8 / 8
    assert "mean of 8" in tables[-1] and "0.66±.02 /.67" in tables[-1]
    assert "full itself scores below 0.9: vt@4096 0.80, vt@16384 0.80" in out and "part of full's" in out


def test_numbers_have_no_exponents(capsys):
    """A slow method, one that ruins the perplexity, one that reads next to nothing."""
    full = row("full", {}, perplexity=10.0, perplexity_ratio=1.0, perplexity_ratio_se=0.0)
    slow = row("h2o", {}, perplexity=1.5e7, perplexity_ratio=1.5e6, perplexity_ratio_se=2e5)
    slow |= {"ms_per_step": 1.234e3, "resident_bytes": 4e13, "bytes_per_step": 1e1}
    ruined = row("loki", {}, perplexity=1e40, perplexity_ratio=1e39, perplexity_ratio_se=1e38, ms_per_step=1e-4)
    print_results(SETTINGS, [full, slow, ruined])
    out = capsys.readouterr().out
    assert "1234" in out and "15000000.00" in out and "40000000.00" in out and "0.000100" in out
    assert not re.search(r"\de[+-]?\d", out)


def test_the_attention_error_of_cla_alone_is_not_measured(capsys):
    """The shared model reads all that it has: zero would read as if nothing were lost."""
    full = row("full", {}, perplexity=10.0, perplexity_ratio=1.0)
    cla = row("cla", {}, perplexity=20.0, perplexity_ratio=2.0, attention_error=[0.0], attention_mass=[1.0])
    after = row("cla+loki", {}, perplexity=21.0, perplexity_ratio=2.1, attention_error=[0.125], attention_mass=[0.5])
    print_results(SETTINGS, [full, cla, after])
    out = capsys.readouterr().out
    lines = {line.split("│")[1].strip(): line for line in out.splitlines() if line.count("│") > 3}
    assert lines["cla"].count("–") == 2 and "0.000" not in lines["cla"]
    assert "0.125" in lines["cla+loki"] and "0.500" in lines["cla+loki"]
    assert "cla alone reads all of that" in " ".join(out.split())


def test_tasks_of_one_length_go_together():
    tasks = ["a@1", "b@2", "mine", *(f"c{number}@1" for number in range(7))]
    assert by_length(tasks) == [["a@1", "c0@1", "c1@1", "c2@1"], ["c3@1", "c4@1", "c5@1", "c6@1"], ["b@2"], ["mine"]]
