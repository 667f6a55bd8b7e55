"""Numbers of the page's words: what is paired, what a level of bytes means, what is not there."""

import json
import math
import statistics

import pytest

ROW = {"perplexity_ratio": 1.5, "perplexity_ratio_se": 0.25, "resident_bytes": 5.0}


@pytest.fixture
def stated(module):
    return module("stated")


@pytest.fixture
def measured(module, stated, tmp_path):
    """Gives the file of a part with these contents."""

    def write(part, body):
        (tmp_path / f"smollm2-135m-{part}.json").write_text(json.dumps(body))
        return stated.Measured(tmp_path, module("subjects").SUBJECTS["smollm2-135m"], part)

    return write


def test_paired_differences_are_of_the_same_windows_and_questions(stated):
    ours = {"window_nll": [3.0, 2.0, 2.5], "sample_scores": {"b": [1, 0], "a": [1, 1]}}
    other = {"window_nll": [2.0, 2.0, 2.0], "sample_scores": {"a": [0, 1], "b": [1, 1]}}
    found = [1.0, 0.0, 0.5]
    nats = stated.nats(ours, other)
    assert nats.value == pytest.approx(0.5) and nats.error == pytest.approx(statistics.stdev(found) / 3**0.5)
    answers = stated.answers(ours, other)
    assert answers.value == 0 and answers.error == pytest.approx(statistics.stdev([1, 0, 0, -1]) / 2)
    with pytest.raises(ValueError, match="zip"):
        stated.nats(ours, {"window_nll": [1.0]})


def test_a_level_of_bytes_is_the_setting_that_reads_so_many(measured, module):
    """Of the same method at other levels nothing is taken."""
    settings = [
        setting
        for level in ("1/16", "1/8")
        for setting in module("settings").at_equal_bytes(module("settings").LEVELS[level], 64, 2048)
        if setting["method"] == "spectral"
    ]
    rows = [{**setting, **ROW, "perplexity_ratio": ratio} for setting, ratio in zip(settings, (1.2, 1.1), strict=True)]
    file = measured("methods-2048", {"results": rows})
    assert (file.ratio("spectral", "1/16").alone, str(file.ratio("spectral", "1/8"))) == ("1.200", "1.100 ± .250")


def test_the_mean_of_tasks_has_the_error_of_independent_means(measured):
    row = {"method": "full", "scores": {"a@8": 1.0, "b@8": 0.5}, "scores_se": {"a@8": 0.3, "b@8": 0.4}}
    found = measured("ruler-2048", {"results": [row]}).scores("full")
    assert found.value == 0.75 and found.error == pytest.approx(0.25)


def test_errors_are_found_by_group_and_setting(measured, module):
    entry = {"setting": {"method": "loki", "rank": 8}, "error": 0.5, "error_se": 0.1}
    file = measured("choices", {'Loki, the rank: {"rank": 8}': [entry], 'Loki, the rank, more: {"rank": 8}': [entry]})
    assert str(file.error("Loki, the rank", rank=8)) == "0.500 ± .100"
    with pytest.raises(module("stated").NotMeasured, match="there are Loki, the rank, Loki, the rank, more"):
        file.error("Loki, the basis", rank=8)


def test_tokens_that_a_loss_would_take(stated):
    """Halved by four times the tokens, it is halved again by four times more."""
    full = {"window_nll": [1.0, 1.0]}
    before, after = (
        (tokens, {"window_nll": [1 + 2 * lost, 1 + lost]}, full) for tokens, lost in ((1e6, 0.4), (4e6, 0.2))
    )
    assert stated.slope(before, after).value == pytest.approx(-0.5)
    assert stated.needed(before, after, math.exp(0.15)) == "16"
    with pytest.raises(stated.NotMeasured, match="loses nothing"):
        stated.slope(before, (4e6, full, full))
