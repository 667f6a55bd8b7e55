"""What a report shows against the artifact's own tensors, in numpy, and against hand-written results."""

import json
import math
import re

import numpy as np
import pytest
from report_samples import HEAD_DIM, ROWS, artifact, results
from samples import artifact as sample

from kvcal.artifacts import ArtifactError, KvcalError
from kvcal.calibrate.reports import report
from kvcal.calibrate.reports.answers import MOST_SAMPLES
from kvcal.calibrate.reports.fitted import shown_dims
from kvcal.calibrate.reports.gathered import gather


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return artifact(tmp_path_factory.mktemp("report") / "a")


def eigenvalues(found, quantity, layer):
    return found.tensor("pca", layer, f"{quantity}.eigenvalues").numpy()


def test_ranks_are_the_least_that_reach_nine_tenths(found):
    ranks = gather(found).ranks
    assert len(ranks) == 5 * 2 * 2
    for rank in ranks:
        values = eigenvalues(found, rank.quantity, rank.layer)[rank.head]
        shares = np.cumsum(values) / values.sum()
        assert shares[rank.rank - 1] >= 0.9 and (rank.rank == 1 or shares[rank.rank - 2] < 0.9)
        assert rank.dims == len(values)


def test_spectra_are_cumulative_shares_of_the_variance(found):
    for spectrum in gather(found).spectra:
        values = eigenvalues(found, spectrum.quantity, spectrum.layer)
        shares = (np.cumsum(values, 1) / values.sum(1, keepdims=True)).mean(0)
        np.testing.assert_allclose(spectrum.explained, shares[np.array(spectrum.dims) - 1], atol=1e-5)
        assert spectrum.dims[-1] == len(shares) and spectrum.explained[-1] == 1


@pytest.mark.parametrize("most", [1, 2, 15, 16, 17, 64, 100, 576])
def test_few_dimensions_of_a_spectrum_are_drawn(most):
    dims = shown_dims(most)
    assert list(dims) == sorted(set(dims)) and dims[-1] == most and len(dims) <= 33 + 6
    assert {2**power for power in range(10) if 2**power <= most} <= set(dims)
    assert dims[: min(most, 16)] == tuple(range(1, min(most, 16) + 1))


def test_radii_are_those_of_the_worst_head_over_one_cluster(found):
    for cover in gather(found).covers:
        radius = found.tensor("clusters", cover.layer, "curve.radius").numpy().max(0)
        np.testing.assert_allclose(cover.radius, radius / radius[0], atol=1e-5)
        assert cover.clusters == tuple(found.tensor("clusters", cover.layer, "curve.counts").tolist())


def test_points_are_shares_of_full(found, tmp_path):
    (evaluation,) = gather(found, [results(tmp_path / "r.json", found)]).evaluations
    assert evaluation.whose == "this artifact" and evaluation.context == "64 tokens of context"
    for point, row in zip(evaluation.points, ROWS, strict=True):
        assert (point.method, point.ratio) == (row["method"], row["perplexity_ratio"])
        assert point.read == row["bytes_per_step"] / 1000 and point.held == row["resident_bytes"] / 2000
        assert point.settings == (f"keep {row['keep']}" if "keep" in row else "")
    best = {each.budget: (each.by_ratio, each.by_score) for each in evaluation.best}
    # 260 of 1000 bytes are within a tenth of a quarter; loki holds more than all.
    assert best["1/4 of the bytes read"][0].label == best["1/4 of the bytes read"][1].label == "loki (keep 0.25)"
    assert best["1/8 of the bytes read"][0].label == "loki (keep 0.125)"
    assert best["1/4 of the bytes held"][0].label == "h2o (keep 0.25)"
    assert "1/8 of the bytes held" not in best


@pytest.mark.parametrize(
    ("settings", "whose"),
    [
        ({}, "this artifact"),
        ({"artifact": "f" * 64}, "another artifact of this model"),
        ({"artifact": "f" * 64, "weights_sha256": "e" * 64}, "another model"),
    ],
)
def test_a_results_file_is_told_apart_by_hashes(found, tmp_path, settings, whose):
    made = gather(found, [results(tmp_path / "r.json", found, **settings)])
    assert made.evaluations[0].whose == whose
    assert any(f"measured with {whose}" in warning for warning in made.warnings) == (whose != "this artifact")


def test_warnings_say_what_numbers_mean_less(found, tmp_path):
    data = {"id": "tiny", "kind": "tiny", "split": "tiny"}
    made = gather(found, [results(tmp_path / "r.json", found, data=data, prefix=10_000)])
    told = " ".join(made.warnings)
    assert "the text tiny was also calibrated on" in told and "contexts of 10000 tokens" in told
    assert "96 tokens are few for a head dim of 24" in told
    assert not any("scores" in warning for warning in made.warnings)  # full answers all


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"perplexity_ratio": math.nan, "perplexity_ratio_se": math.nan, "resident_bytes": math.nan}, {}),
        ({"resident_bytes": -1.0, "scores": {"asked@64": None}, "method": [{"method": "loki"}]}, {}),
        ({}, {"data": {"id": 3, "sources": [1, None], "files": 7}, "model": None, "prefix": "many"}),
        ({"scores_se": {"asked@64": 1e299}, "perplexity_ratio": 1e299}, {}),
        ({}, {"data": [], "artifact": []}),
        ({}, {"data": {"kind": "local", "id": "a\0b", "files": ["x"]}}),
    ],
)
def test_a_strangers_results_are_shown_as_far_as_they_go(found, tmp_path, row, settings):
    path = results(tmp_path / "r.json", found, **settings)
    body = json.loads(path.read_text())
    for changed in (body["results"][0], body["results"][1]):
        changed |= {name: value for name, value in row.items() if name != "method" or changed["method"] != "full"}
    path.write_text(json.dumps(body))
    page = report(found, [path])
    json.loads(re.search(r'id="figures">(.*?)</script>', page, re.DOTALL)[1], parse_constant=pytest.fail)


def test_files_of_one_name_are_told_apart_by_their_folders(found, tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    made = gather(found, [results(tmp_path / name / "r.json", found) for name in ("x", "y")])
    assert [each.name for each in made.evaluations] == ["x/r.json", "y/r.json"]


def test_samples_are_bounded_and_old_results_without_questions_load(found, tmp_path):
    path = results(tmp_path / "r.json", found, samples=MOST_SAMPLES + 5)
    made = gather(found, [path]).samples[0]
    assert len(made) == MOST_SAMPLES and [sample.number for sample in made] == list(range(1, MOST_SAMPLES + 1))
    assert made[0].question == "question 0 of asked@64" and made[0].expected == "answer to asked@64"
    assert [(answer.method, answer.text) for answer in made[0].answers] == [
        (row["method"], f"{row['method']} says asked@64") for row in ROWS
    ]
    beside = tmp_path / "r.predictions.jsonl"
    lines = [json.loads(line) for line in beside.read_text().splitlines()]
    old = [{name: value for name, value in line.items() if name != "question"} for line in lines]
    beside.write_text("".join(json.dumps(line) + "\n" for line in old))
    assert {sample.question for sample in gather(found, [path]).samples[0]} == {""}
    beside.unlink()
    assert gather(found, [path]).samples == ((),)


def test_the_plan_by_layer(found):
    plan = gather(found).plan
    (layer,) = plan.layers
    assert (layer.layer, layer.method, layer.settings) == (0, "spectral", "rank 4, keep 0.125")
    assert (layer.bytes, layer.error, plan.ratio, plan.budget) == (0.03, 0.25, 1.01, "bytes 0.0625")


def test_what_is_absent_is_absent():
    made = gather(sample(head_dim=HEAD_DIM))
    assert made.covers == () and made.plan is None and made.evaluations == () and made.provenance.megabytes is None


@pytest.mark.parametrize(
    "body", ["", "{}", "[]", '{"settings": {}, "results": []}', '{"settings": {}, "results": [1]}']
)
def test_other_files_are_refused_in_one_line(found, tmp_path, body):
    (tmp_path / "r.json").write_text(body)
    with pytest.raises(KvcalError, match=r"r\.json: "):
        gather(found, [tmp_path / "r.json"])


@pytest.mark.parametrize(
    "plan",
    [{"offers": []}, {"offers": {"0": [7]}}, {"budget": 3, "measured": "x", "warnings": 5}, {"layers": [None, None]}],
)
def test_a_strangers_plan_is_shown_as_far_as_it_goes(tmp_path, plan):
    assert gather(artifact(tmp_path / "a", **plan)).plan is not None


def test_a_plan_of_another_model_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="3 layers"):
        gather(artifact(tmp_path / "a", layers=[None] * 3))
