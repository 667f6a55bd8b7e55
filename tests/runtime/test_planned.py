"""The plan of an artifact: read as if sent by a stranger, decoded with where no method is named."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from compressed import artifact, greedy, model, padded

from kvcal.artifacts import ArtifactError, KvcalError, save
from kvcal.runtime import CompressedCache, compress, decode, load
from kvcal.runtime.methods.full import Full
from kvcal.runtime.methods.loki import Loki
from kvcal.runtime.methods.quest import Quest
from kvcal.runtime.planned import FILE, chosen, has_plan, read_plan

LAYERS = [
    {"method": "loki", "rank": 0.5, "keep": 0.25},
    {"method": "quest", "page": 4, "keep": 0.5},
    {"method": "full"},
]


@pytest.fixture
def folder(tmp_path):
    return save(dataclasses.replace(artifact(), folder=None), tmp_path / "artifact").folder


def planned(folder, body):
    (folder / FILE).write_text(body if isinstance(body, str) else json.dumps(body))
    return load(folder)


def test_a_plan_is_what_no_method_means(folder):
    of, inputs = model(), padded(9, 23)
    assert CompressedCache(of, load(folder)).blueprint.methods == dict.fromkeys(range(3), Loki())
    found = planned(folder, {"format": 1, "layers": LAYERS})
    methods = {0: Loki(rank=0.5, keep=0.25), 1: Quest(page=4, keep=0.5), 2: Full()}
    assert CompressedCache(of, found).blueprint.methods == methods
    assert CompressedCache(of, found, "plan").blueprint.methods == methods
    assert CompressedCache(of, found, "loki").blueprint.methods == dict.fromkeys(range(3), Loki())
    with compress(of, found):
        tokens, logits, _ = greedy(of, inputs)
    with compress(of, found, method=LAYERS):
        expected, expected_logits, _ = greedy(of, inputs)
    assert torch.equal(tokens, expected) and torch.equal(logits, expected_logits)
    by_loop = decode(of, inputs["input_ids"], found, max_new_tokens=6, attention_mask=inputs["attention_mask"])
    assert torch.equal(by_loop.tokens, tokens)


def test_layers_without_a_setting_keep_the_models_own_attention(folder):
    found = planned(folder, {"format": 1, "layers": [None, LAYERS[1], None]})
    assert CompressedCache(model(), found).blueprint.methods == {0: Full(), 1: Quest(page=4, keep=0.5), 2: Full()}


def test_settings_beside_a_plan_are_refused(folder):
    found = planned(folder, {"format": 1, "layers": LAYERS})
    with pytest.raises(KvcalError, match=r"keep: the plan of this artifact has settings of its own: name a method"):
        CompressedCache(model(), found, keep=0.5)
    assert CompressedCache(model(), found, "loki", keep=0.5).blueprint.methods[0] == Loki(keep=0.5)


def test_no_plan(folder):
    assert not has_plan(None) and not has_plan(load(folder))
    assert chosen(None, None, {}, 3) == "loki"
    with pytest.raises(ArtifactError, match=r"has no plan.json: make it with `calibrate plan"):
        CompressedCache(model(), load(folder), "plan")
    with pytest.raises(ArtifactError, match="no artifact was given: make it with"):
        CompressedCache(model(), None, "plan")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{", "cannot be read"),
        ("[" * 100000, "cannot be read"),
        ("[]", "is no plan of format 1"),
        ({"format": 2, "layers": LAYERS}, "is no plan of format 1"),
        ({"format": 1}, "expected a list of settings"),
        ({"format": 1, "layers": ["loki", "loki"]}, "expected a list of settings"),
        ({"format": 1, "layers": [{"keep": 0.5}] * 3}, "expected a list of settings"),
        ({"format": 1, "layers": [{"method": "loki", "keep": [1]}] * 3}, "expected a list of settings"),
        ({"format": 1, "layers": LAYERS[:1]}, "has 1 layers, this model has 3"),
        ({"format": 1, "layers": [{"method": "lokki"}] * 3}, "unknown method 'lokki'"),
        ({"format": 1, "layers": [{"method": "loki", "page": 3}] * 3}, "loki has no parameter 'page'"),
        ({"format": 1, "layers": [{"method": "loki", "keep": 2.0}] * 3}, "a fraction is at most 1.0"),
        (json.dumps({"format": 1, "layers": LAYERS}) + " " * (5 << 20), "is larger than"),
    ],
)
def test_bad_plans_are_refused_in_one_line(folder, body, message):
    found = planned(folder, body)
    with pytest.raises(KvcalError, match=message) as caught:
        CompressedCache(model(), found)
    assert "\n" not in str(caught.value)


OLD = {"method": "spectral", "rank": 32, "bits": 2, "keep": 0.03, "tokens_per_cluster": 80, "refine": 1.0}


def test_a_plan_for_clusters_says_what_to_do(folder):
    found = planned(folder, {"format": 1, "layers": [None, LAYERS[0], OLD]})
    with pytest.raises(ArtifactError, match=r"plan.json, layer 2: refine, tokens_per_cluster: made for") as caught:
        CompressedCache(model(), found)
    assert str(caught.value).endswith("now: plan anew with `calibrate plan ARTIFACT --model MODEL --data DATA`")
    without = {name: stage for name, stage in found.stages.items() if name != "codebook"}
    with pytest.raises(ArtifactError, match=r"with `calibrate cluster ARTIFACT --metric joint`, then `calibrate plan"):
        CompressedCache(model(), dataclasses.replace(found, stages=without))
    assert CompressedCache(model(), found, "loki").blueprint.methods[0] == Loki()


def test_bytes_that_are_no_text(folder):
    (folder / FILE).write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_plan(load(folder))
