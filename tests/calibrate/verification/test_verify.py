"""What `load` cannot tell without reading everything: `calibrate verify` holds what docs/format.md promises."""

import json
import math
import shutil

import pytest
import torch
from architectures import build
from cli_runs import refused as refused_by
from samples import edit_manifest, edit_stage

from kvcal.artifacts import KvcalError, Stage, load, save
from kvcal.calibrate.blocks import TokenBlocks
from kvcal.calibrate.cla import share
from kvcal.calibrate.cluster_stage import cluster
from kvcal.calibrate.one_pass import calibrate
from kvcal.calibrate.verification import verify

SETTING = {"method": "loki", "rank": 0.5, "keep": 0.25}


def calibrated(name="llama", reservoir=100, metric="cosine", **settings):
    """Of four texts of 32 tokens each, 126 of which count."""
    ids = torch.randint(3, 96, (4, 32), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    counted = torch.ones(4, 32, dtype=torch.bool)
    counted[3, 30:] = False
    blocks = TokenBlocks(ids, counted, counted, {"id": "random"})
    return cluster(calibrate(build(name), blocks, reservoir=reservoir, **settings), clusters=6, metric=metric)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = save(share(calibrated()), tmp_path_factory.mktemp("good") / "a").folder
    (folder / "plan.json").write_text(json.dumps({"format": 1, "layers": [SETTING, None, SETTING]}))
    return folder


@pytest.fixture(scope="module")
def loaded(good):
    return load(good)


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "a")


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"name": "gpt2", "reservoir": 400}, id="no rotary embedding, all tokens sampled"),
        pytest.param({"name": "gemma3", "metric": "l2", "centred": False}, id="windows, l2, not centred"),
    ],
)
def test_what_calibration_makes_holds(tmp_path, settings):
    verify(load(save(calibrated(**settings), tmp_path / "a").folder))


def test_all_stages_and_a_plan_hold(loaded):
    verify(loaded)


def swapped(tensor):
    """The two KV heads changed places."""
    tensor[[0, 1]] = tensor[[1, 0]]


def other_head(tensor):
    tensor[1] = tensor[0].clone()


def put(*index, value):
    def edit(tensor):
        tensor[index] = value

    return edit


def times(factor, *index):
    def edit(tensor):
        tensor[index] *= factor

    return edit


def turned(tensor):
    """Two components by an angle: still orthonormal."""
    first, second = tensor[0, 0].clone(), tensor[0, 1].clone()
    tensor[0, 0], tensor[0, 1] = 0.8 * first + 0.6 * second, 0.8 * second - 0.6 * first
    for row in (0, 1):
        if tensor[0, row][tensor[0, row].abs().argmax()] < 0:
            tensor[0, row] *= -1


FAULTS = {
    "moments": [
        ("layers.0.key_post.count", put(value=125), "key_post.count is 125, expected 126, of 126 tokens"),
        ("layers.0.query_pre.count", put(value=126), "query_pre.count is 126, expected 252, of 126 tokens"),
        ("layers.1.value.mean", put(1, 2, value=math.nan), "layers.1.value.mean, KV head 1, entry 2 is nan"),
        ("layers.1.value.covariance", put(1, 2, 2, value=math.inf), "covariance, KV head 1, entry 2, 2 is inf"),
        ("layers.1.value.covariance", times(1.1, 0, 2, 3), "KV head 0, entry 2, 3 is .*, expected a symmetric matrix"),
        (
            "layers.1.value.covariance",
            times(-1, 0),
            r"\(its eigenvalues, ascending\), KV head 0, entry 0 is -.* none below",
        ),
        (
            "layers.1.key_pre.covariance",
            times(1.001),
            "layers.1.key_pre.eigenvalues, KV head 0, entry 0 is .* expected that of the",
        ),
    ],
    "pca": [
        ("layers.2.value.eigenvalues", times(1.0001, 1, 0), "layers.2.value.eigenvalues, KV head 1, entry 0 is"),
        ("layers.2.query_pre.eigenvalues_uncentred", swapped, "query_pre.eigenvalues_uncentred, KV head 0, entry 0 is"),
        (
            "layers.0.key_post.mean",
            times(1.001, 1, 3),
            "key_post.mean, KV head 1, entry 3 is .* expected the mean in the",
        ),
        (
            "layers.0.key_post.components",
            swapped,
            r"components \(times the covariance\), KV head 0, entry .* eigenvalue",
        ),
        ("layers.0.key_post.components", turned, r"components \(times the covariance\), KV head 0, entry 0, "),
        (
            "layers.0.key_pre.components",
            times(-1, 1, 4),
            "components, KV head 1, entry 4 is .* largest entry, positive",
        ),
    ],
    "score": [
        (
            "layers.0.pre.singular_values",
            times(1.01, 1),
            "singular_values, KV head 1, entry 0 is .* that of the stage mom",
        ),
        ("both maps of layers.1.post", swapped, r"query_map \(times the queries' second moment\), KV head 0, entry"),
        (
            "layers.2.post.query_map and key_map",
            None,
            r"query_map \(times the queries' second moment\), KV head 0, entry",
        ),
    ],
    "reservoir": [
        ("layers.0.key_post", put(1, 3, 2, value=math.nan), "layers.0.key_post, KV head 1, entry 3, 2 is nan"),
        ("layers.0.query_post", put(1, 3, 2, value=math.inf), "layers.0.query_post, KV head 1, entry 3, 2 is inf"),
        ("layers.0.key_post", swapped, "layers.0.sizes, KV head 0, entry"),
        ("layers.0.value", swapped, "layers.0.value_mean, KV head 0, entry"),
        ("layers.1.query_post", times(1.01), "layers.1.curve.query_norm_max, KV head 0 is"),
    ],
    "clusters": [
        ("layers.0.centroids", swapped, "layers.0.sizes, KV head 0, entry .* this head's sampled keys"),
        ("layers.2.centroids", other_head, "layers.2.sizes, KV head 1, entry .* this head's sampled keys"),
        ("layers.0.centroids", None, "layers.0.(sizes|radius_mean), KV head 0, entry"),
        ("layers.0.radius_mean", times(0.99, 1, 2), "radius_mean, KV head 1, entry 2 is"),
        ("layers.0.radius_p95", times(0.99, 1, 2), "radius_p95, KV head 1, entry 2 is"),
        ("layers.0.radius_max", times(1.01, 1, 2), "radius_max, KV head 1, entry 2 is"),
        ("layers.0.value_mean", swapped, "value_mean, KV head 0, entry 0, "),
        ("layers.0.inertia", times(1.01, 1), "inertia, KV head 1 is"),
        ("layers.0.curve.radius", times(5.0, 1), "curve.radius, KV head 1 is .* half to twice"),
        (
            "layers.0.curve.radius",
            put(1, -1, value=1e-3),
            "curve.radius, KV head 1, entry 0 is 0.001, expected 0 where",
        ),
        ("layers.0.curve.counts", put(-1, value=99), "curve.counts is 99, expected last 100"),
        ("layers.0.curve.query_norm_p99", times(0.9, 0), "query_norm_p99, KV head 0 is"),
    ],
    "codebook": [
        ("layers.0.key", swapped, "layers.0.sizes, KV head 0, entry .* this head's sampled tokens"),
        ("layers.2.value", other_head, "layers.2.sizes, KV head 1, entry .* this head's sampled tokens"),
        ("layers.1.spread", times(1.01, 1, 0), "layers.1.spread, KV head 1, entry 0 is .* that of the stage moments"),
        ("layers.0.sizes", swapped, "layers.0.sizes, KV head 0, entry"),
        ("layers.0.code.singular_values", times(1.01, 1), "code.singular_values, KV head 1, entry 0 is"),
        ("layers.0.code.query_map", swapped, r"code.query_map \(times the queries' second moment\), KV head 0, entry"),
    ],
}


def plant(tensors, name, edit):
    """Of tensors whose edit is None, what another layer or the other side has."""
    if name.startswith("both maps"):
        for part in ("query_map", "key_map"):
            edit(tensors[f"layers.1.post.{part}"])
    elif edit is None and " and " in name:
        queries, keys = (f"layers.2.post.{part}_map" for part in ("query", "key"))
        tensors[queries], tensors[keys] = tensors[keys], tensors[queries]
    elif edit is None:
        tensors[name] = tensors["layers.1.centroids"].clone()
    else:
        edit(tensors[name])


@pytest.mark.parametrize(
    ("stage", "name", "edit", "message"),
    [pytest.param(stage, *fault, id=f"{fault[0]}-{at}") for stage in FAULTS for at, fault in enumerate(FAULTS[stage])],
)
def test_a_value_that_does_not_follow_from_the_others_is_named(loaded, stage, name, edit, message):
    refused(loaded, stage, lambda tensors: plant(tensors, name, edit), message)


def refused(loaded, stage, edit, message):
    found = loaded.stages[stage]
    tensors = {name: tensor.clone() for name, tensor in found.tensors.items()}
    edit(tensors)
    with pytest.raises(KvcalError, match=message) as caught:
        verify(loaded.with_stage(stage, Stage(tensors, found.settings)))
    assert "\n" not in str(caught.value) and str(loaded.folder) in str(caught.value)


def test_a_float16_sample_with_an_infinity(loaded):
    def edit(tensors):
        tensors |= {name: tensor.half() for name, tensor in tensors.items() if name.startswith("layers.")}
        tensors["layers.1.value"][0, 5, 1] = math.inf

    refused(loaded, "reservoir", edit, "layers.1.value, KV head 0, entry 5, 1 is inf")


def test_the_command_says_it_in_one_line(folder):
    edit_stage(folder, "clusters", lambda tensors: other_head(tensors["layers.2.centroids"]))
    assert "layers.2.sizes, KV head 1" in refused_by("verify", folder)


MANIFESTS = [
    (lambda body: body["data"].update(tokens_counted=125), r"count is 126, expected 125, of 125 tokens"),
    (lambda body: body["data"].update(tokens_counted=129), r"tokens_counted is 129, expected 2 to 128"),
    (lambda body: body["settings"].update(reservoir=99), r"token is 100 tokens, expected 99 of 126 counted"),
    (lambda body: body["settings"].update(centred=False), r"components \(times the covariance\)"),
    (lambda body: body["settings"].update(batch_size=0), r"settings: batch_size is 0"),
    (lambda body: body["model"]["fingerprint"].update(num_hidden_layers=4), r"layers is 3 layers, expected 4"),
    (lambda body: body["model"]["fingerprint"].update(num_key_value_heads=4), r"kv_heads is \[2\], expected 4"),
    (lambda body: body["model"]["fingerprint"].update(num_attention_heads=8), r"query_heads is \[4\], expected 8"),
    (lambda body: body["model"]["fingerprint"].update(head_dim=8), r"head_dim is \[16\], expected 8"),
    (lambda body: body["model"]["fingerprint"]["rope_parameters"].update(rope_theta=0), r"rope_theta is 0, expected a"),
    (
        lambda body: body["model"]["fingerprint"].update(rope_parameters=[1]),
        r"rope_parameters is \[1\], expected an obj",
    ),
    (
        lambda body: body["model"]["fingerprint"].update(sliding_window=7) or body["layers"][1].update(window=8),
        r"window",
    ),
    (lambda body: body["stages"]["cla"]["settings"].update(groups="0-1"), r"groups 0-1: layers 2 are in none"),
    (lambda body: body["stages"]["cla"]["settings"].update(stored_layers=3), r"stored_layers is 3, expected 2"),
    (
        lambda body: body["stages"]["cla"]["settings"].update(pool="last"),
        r"pool is last, expected mean or first or fitted",
    ),
    (lambda body: body["stages"]["cla"]["settings"].update(pool="fitted"), r"pool is fitted, expected weights beside"),
]


@pytest.mark.parametrize(("edit", "message"), MANIFESTS)
def test_a_manifest_that_contradicts_itself(folder, edit, message):
    edit_manifest(folder, edit)
    with pytest.raises(KvcalError, match=message):
        verify(load(folder))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([SETTING, None], "plan.json has 2 layers, this model has 3"),
        ([SETTING, None, {"method": "lokki"}], "plan.json: unknown method 'lokki'"),
        ([SETTING, None, {"method": "loki", "spin": 1}], "plan.json: loki has no parameter 'spin'"),
        ([SETTING, None, {"method": "loki", "rank": 17}], "plan.json: loki, layer 2: rank 17 is above the head dim 16"),
    ],
)
def test_a_plan_that_cannot_be_decoded_with(folder, layers, message):
    (folder / "plan.json").write_text(json.dumps({"format": 1, "layers": layers}))
    with pytest.raises(KvcalError, match=message):
        verify(load(folder))
