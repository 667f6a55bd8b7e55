"""Values that decode wrongly, behind hashes that are right: `load` names tensor, layer, KV head and value."""

import math
import shutil
from functools import partial

import pytest
import torch
from samples import artifact, clusters, codebook, edit_manifest, edit_stage

from kvcal.artifacts import ArtifactError, Stage, load, save
from kvcal.artifacts.schema import LAYER_TENSORS
from kvcal.artifacts.values import check_values

NOTHING_SHARED = {"groups": "0,1", "pattern": "list", "pool": "mean", "stored_layers": 2, "keys_aligned": "pre"}


def made():
    """Every stage, the bases of one layer's shared keys among them."""
    found = artifact()
    costs = {
        f"layers.{layer}.{name}": torch.tensor([0.5, math.nan], dtype=torch.float64)
        for layer in range(2)
        for name in LAYER_TENSORS["cla"]
    }
    bases = {
        name: tensor.clone()
        for name, tensor in found.stages["pca"].tensors.items()
        if name.startswith(("layers.0.key_pre.", "layers.0.key_post."))
    }
    sharing = Stage({**costs, **bases}, {**NOTHING_SHARED, "uptraining": None})
    return found.with_stage("clusters", clusters()).with_stage("codebook", codebook(found)).with_stage("cla", sharing)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return save(made(), tmp_path_factory.mktemp("good") / "a").folder


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "a")


def put(*index, value):
    def edit(tensor):
        tensor[index] = value

    return edit


def scaled(factor):
    return lambda tensor: tensor.mul_(factor)


def swapped(tensor):
    tensor[1, [0, 1]] = tensor[1, [1, 0]]


BIG = 1e38
FAULTS = {
    "pca": [
        ("layers.1.key_post.components", put(1, 2, 3, value=math.nan), "KV head 1, entry 2, 3 is nan, expected a num"),
        ("layers.1.key_post.components", put(1, 2, value=0.0), "KV head 1, entry 2, 2 is 0, expected orthonormal"),
        ("layers.0.key_pre.components", scaled(1.001), "KV head 0, entry 0, 0 is 1.002, expected orthonormal"),
        ("layers.0.key_pre.components", scaled(1e25), "KV head 0, entry 0, 0 is .*, expected a number from -2 to 2"),
        ("layers.0.key_pre.components", put(0, 1, value=torch.tensor([1.0, 0, 0, 0])), "expected orthonormal rows"),
        ("layers.0.key_pre.mean", put(1, 0, value=math.inf), "KV head 1, entry 0 is inf, expected a number from -1e"),
        ("layers.0.key_pre.mean", put(1, 0, value=-BIG), "KV head 1, entry 0 is -1e"),
        (
            "layers.0.value.eigenvalues",
            put(0, 2, value=-1e-9),
            "KV head 0, entry 2 is -1e-09, expected a number",
        ),
        ("layers.0.value.eigenvalues", swapped, "KV head 1, entry 1 is .* expected no more than the entry before it"),
        ("layers.1.query_pre.eigenvalues_uncentred", put(0, 0, value=math.nan), "KV head 0, entry 0 is nan"),
        ("layers.1.query_pre.eigenvalues_uncentred", put(0, 0, value=1e200), "KV head 0, entry 0 is 1e.200"),
    ],
    "score": [
        ("layers.1.post.query_map", put(0, 0, 0, value=math.nan), "KV head 0, entry 0, 0 is nan"),
        ("layers.1.post.query_map", scaled(2), "KV head 0, entry 0, 0 is 2, expected 1 with its own row of key_map"),
        ("layers.1.pre.key_map", swapped, "query_map .times key_map., KV head 1, entry 0, 0 is"),
        ("layers.1.pre.key_map", scaled(1e30), "pre.key_map, KV head 0, entry 0, 0 is"),
        ("layers.0.pre.singular_values", swapped, "singular_values, KV head 1, entry 1 is"),
        ("layers.0.pre.singular_values", scaled(-1), "singular_values, KV head 0, entry 0 is -"),
    ],
    "reservoir": [
        ("token", put(0, value=-1), "token, entry 0 is -1, expected 0 to 15 .1 blocks of 16."),
        ("token", put(6, value=16), "token, entry 6 is 16, expected 0 to 15"),
        ("token", put(6, value=1 << 62), "token, entry 6 is 4.61169e.18"),
        ("token", put(3, value=2), "token, entry 3 is 2, expected more than the entry before it"),
        ("position", put(3, value=4), "position, entry 3 is 4, expected token modulo 16"),
    ],
    "clusters": [
        ("layers.0.centroids", put(1, 0, 2, value=math.nan), "KV head 1, entry 0, 2 is nan"),
        ("layers.0.centroids", scaled(BIG), "centroids, KV head 0, entry 0, 0 is"),
        ("layers.1.sizes", put(1, 1, value=-2), "sizes, KV head 1, entry 1 is -2"),
        ("layers.1.sizes", put(1, 0, value=6), r"sizes \(their sum\), KV head 1 is 8, expected the number of keys"),
        ("layers.1.sizes", put(1, 1, value=9), "KV head 1, entry 1 is 9, expected no more than the entry before it"),
        ("layers.1.sizes", put(0, 0, value=1 << 50), "KV head 0, entry 0 is 1.1259e.15"),
        (
            "layers.1.radius_mean",
            put(0, 0, value=1.01),
            "radius_mean, KV head 0, entry 0 is 1.01, expected 0 to",
        ),
        ("layers.1.radius_p95", put(0, 0, value=math.nan), "radius_p95, KV head 0, entry 0 is nan"),
        ("layers.1.radius_max", put(0, 0, value=-1), "radius_max, KV head 0, entry 0 is -1"),
        ("layers.1.value_mean", put(0, 1, 2, value=math.inf), "value_mean, KV head 0, entry 1, 2 is inf"),
        ("layers.0.inertia", put(1, value=-1), "inertia, KV head 1 is -1"),
        ("layers.0.silhouette", put(1, value=1.5), "silhouette, KV head 1 is 1.5, expected -1 to 1, or NaN"),
        ("layers.0.curve.counts", put(1, value=3), "curve.counts, entry 1 is 3, expected 1, 2, 4"),
        ("layers.0.curve.radius", put(1, 1, value=3), "curve.radius, KV head 1, entry 1 is 3, expected no more than"),
        ("layers.0.curve.radius", put(1, 1, value=math.nan), "curve.radius, KV head 1, entry 1 is nan"),
        (
            "layers.0.curve.query_norm_p99",
            put(1, value=3),
            "query_norm_p99, KV head 1 is 3, expected 0 to query",
        ),
        ("layers.0.warm_start.plusplus_iterations", put(0, value=0), "plusplus_iterations, KV head 0 is 0"),
        ("layers.0.warm_start.plusplus_iterations", put(0, value=21), "plusplus_iterations, KV head 0 is 21"),
        ("layers.0.warm_start.random_inertia", put(0, value=math.inf), "random_inertia, KV head 0 is inf"),
    ],
    "codebook": [
        ("layers.0.key", put(1, 0, 2, value=math.nan), "layers.0.key, KV head 1, entry 0, 2 is nan"),
        ("layers.0.value", scaled(BIG), "layers.0.value, KV head 0, entry 0, 0 is"),
        ("layers.1.spread", put(1, 0, value=0), "spread, KV head 1, entry 0 is 0, expected a number from 1.17549e-38"),
        ("layers.1.spread", put(1, 1, value=math.inf), "spread, KV head 1, entry 1 is inf"),
        ("layers.1.sizes", put(1, 1, value=-2), "sizes, KV head 1, entry 1 is -2"),
        ("layers.1.sizes", put(1, 1, value=9), "KV head 1, entry 1 is 9, expected no more than the entry before it"),
        ("layers.0.code.query_map", scaled(2), "KV head 0, entry 0, 0 is 2, expected 1 with its own row of key_map"),
        ("layers.0.code.key_map", put(0, 0, 0, value=math.nan), "code.key_map, KV head 0, entry 0, 0 is nan"),
        ("layers.0.code.singular_values", swapped, "singular_values, KV head 1, entry 1 is"),
        ("layers.0.carry.sizes", put(1, value=1), "carry.sizes, entry 1 is 1, expected 1 to 256, ascending"),
        ("layers.0.carry.key_unseen", put(1, 1, value=-0.1), "carry.key_unseen, KV head 1, entry 1 is -0.1"),
    ],
    "cla": [
        ("layers.1.key_r2", put(0, value=1.5), "key_r2, entry 0 is 1.5, expected -1e.18 to 1, or NaN"),
        ("layers.1.cost_aligned", put(1, value=-0.1), "cost_aligned, entry 1 is -0.1"),
        ("layers.1.cost_aligned", put(1, value=math.inf), "cost_aligned, entry 1 is inf"),
        ("layers.0.key_post.components", scaled(0.5), "expected orthonormal rows"),
        ("layers.0.key_post.eigenvalues", swapped, "expected no more than the entry before it"),
    ],
}


@pytest.mark.parametrize(
    ("stage", "name", "edit", "message"),
    [pytest.param(stage, *fault, id=f"{fault[0]}-{at}") for stage in FAULTS for at, fault in enumerate(FAULTS[stage])],
)
def test_a_wrong_value_is_refused_by_name(stage, name, edit, message):
    found = made()
    tensors = found.stages[stage].tensors
    check = partial(check_values, f"{stage}.safetensors", stage, tensors, found.stages[stage].settings, found)
    check()
    edit(tensors[name])
    with pytest.raises(ArtifactError, match=message) as caught:
        check()
    text = str(caught.value)
    assert "\n" not in text and text.startswith(f"{stage}.safetensors: ") and name.rpartition(".")[0] in text


def test_load_refuses_what_the_check_refuses(folder):
    edit_stage(folder, "pca", lambda tensors: tensors["layers.1.key_post.mean"].fill_(math.nan))
    with pytest.raises(ArtifactError, match=r"a/pca\.[0-9a-f]{8}\.safetensors: layers.1.key_post.mean, KV head 0"):
        load(folder)


def test_what_is_odd_and_right_is_loaded(folder):
    """Zeros of either sign, subnormal numbers, silhouettes that are undefined, a head that has one direction only."""

    def flat(tensors):
        tensors["layers.0.value.eigenvalues"][0] = torch.tensor([1e-310, 0.0, -0.0])
        tensors["layers.0.key_pre.mean"].fill_(1e-40)

    def one_direction(tensors):
        tensors["layers.0.pre.singular_values"][0, 1:] = 0
        for part in ("query_map", "key_map"):
            tensors[f"layers.0.pre.{part}"][0, 1:] = 0

    edit_stage(folder, "pca", flat)
    edit_stage(folder, "score", one_direction)
    edit_stage(folder, "clusters", lambda tensors: tensors["layers.0.silhouette"].fill_(math.nan))
    load(folder)


def emptied(*names):
    def edit(tensors):
        for name in list(tensors):
            for dimension in [at for suffix, at in names if name.endswith(suffix)]:
                tensors[name] = tensors[name].narrow(dimension, 0, 0).clone()

    return edit


@pytest.mark.parametrize(
    ("stage", "names", "message"),
    [
        ("reservoir", [("token", 0), ("position", 0), ("_post", 1), ("value", 1)], "token is empty, expected at least"),
        (
            "clusters",
            [
                ("centroids", 1),
                ("sizes", 1),
                ("value_mean", 1),
                *((f"radius_{of}", 1) for of in ("mean", "p95", "max")),
            ],
            "sizes is of 0 clusters, expected 2",
        ),
        (
            "codebook",
            [(f"layers.{layer}.{name}", 1) for layer in (0, 1) for name in ("key", "value", "sizes")],
            "sizes is of 0 codewords, expected 2, 1 to 256",
        ),
        ("clusters", [("curve.counts", 0), ("curve.radius", 1)], "curve.counts is of 0 entries, expected 1, 2, 4"),
    ],
)
def test_empty_stages_are_refused(folder, stage, names, message):
    edit_stage(folder, stage, emptied(*names))
    with pytest.raises(ArtifactError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda body: body["layers"][0].update(scaling=0), "layer 0: scaling"),
        (lambda body: body["layers"][0].update(scaling=-0.5), "layer 0: scaling"),
        (lambda body: body["layers"][0].update(scaling=5e-324), "layer 0: scaling"),
        (lambda body: body["stages"]["clusters"]["settings"].update(metric="l3"), "metric of stage clusters is l3"),
        (lambda body: body["stages"]["clusters"]["settings"].update(metric="cosine"), "is .* expected unit length"),
        (lambda body: body["stages"]["clusters"]["settings"].update(clusters=3), "of 2 clusters, expected 3"),
        (lambda body: body["stages"]["codebook"]["settings"].update(codewords=3), "of 2 codewords, expected 3"),
        (lambda body: body["data"].update(seq_len=0), "expected 0 to -1"),
    ],
)
def test_settings_that_contradict_the_values(folder, edit, message):
    edit_manifest(folder, edit)
    with pytest.raises(ArtifactError, match=message):
        load(folder)
