"""What the method `cla` makes of its parameters and of an artifact's stage."""

from dataclasses import replace

import pytest
import samples
import torch

from kvcal.artifacts import KvcalError, Stage
from kvcal.runtime.cla import SharingMap
from kvcal.runtime.cla.method import Cla, check_methods, resolve, split_method, stage_map, with_bases
from kvcal.runtime.methods import METHODS

WEIGHT, BASIS = torch.ones(2, 2), torch.eye(4).expand(2, 4, 4)
TRAINED = {"weights.a.k_proj.weight": WEIGHT, "layers.0.key_post.components": BASIS, "layers.0.to_1.cost": WEIGHT}


def artifact(tensors=None, **settings):
    stage = Stage(tensors or {}, {"groups": "0-1", "pool": "mean", **settings})
    return samples.artifact().with_stage("cla", stage)


@pytest.mark.parametrize(
    ("method", "inner"), [("cla", "full"), ("cla+full", "full"), ("cla+loki", "loki"), ("cla+clusterkv", "clusterkv")]
)
def test_a_method_is_split_into_what_shares_and_what_decodes(method, inner):
    cla, decoder, settings = split_method(method, {"groups": "0-1", "pool": "first", "keep": 0.5})
    assert cla == Cla("0-1", "first") and decoder == inner and settings == {"keep": 0.5}


@pytest.mark.parametrize("method", ["loki", {"0": "full"}, ["full", "loki"]])
def test_other_methods_stay_as_they_are(method):
    assert split_method(method, {"pool": 1}) == (None, method, {"pool": 1})


def test_groups_are_the_stages_or_given():
    assert resolve(Cla(), artifact()).map == SharingMap(((0, 1),))
    for groups in ("0,1", SharingMap(((0,), (1,)))):
        assert resolve(Cla(groups), artifact()).map == SharingMap(((0,), (1,)))
        assert resolve(Cla(groups), None).map == SharingMap(((0,), (1,)))
    for of in (None, samples.artifact()):
        with pytest.raises(KvcalError, match=r"which layers share.*give groups.*`calibrate share ARTIFACT --model M`"):
            resolve(Cla(), of)


@pytest.mark.parametrize("settings", [{}, {"groups": 5}, {"groups": None}, {"groups": "9" * 5000}, {"groups": ["0-1"]}])
def test_a_stage_that_does_not_say_which_layers_share(settings):
    damaged = samples.artifact().with_stage("cla", Stage({}, settings))
    for use in (stage_map, lambda of: resolve(Cla(), of)):
        with pytest.raises(KvcalError, match=r"its stage cla is damaged .*`calibrate share ARTIFACT") as caught:
            use(damaged)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    for groups in (4, [(0,), (1,)]):
        with pytest.raises(KvcalError, match="give a text"):
            resolve(Cla(groups), artifact())


def test_trained_weights_and_bases_go_with_their_groups():
    trained = artifact(TRAINED)
    for groups in (None, "0-1"):
        found = resolve(Cla(groups), trained)
        assert found.weights == {"a.k_proj.weight": WEIGHT}
        assert found.bases == {"layers.0.key_post.components": BASIS}  # not the costs
    for cla in (Cla(uptrained=False), Cla("0,1"), Cla(pool="first", uptrained=False)):
        found = resolve(cla, trained)
        assert not found.weights and not found.bases and found.pool == cla.pool
    assert not resolve(Cla(), artifact()).weights  # nothing was trained yet


def test_another_pool_than_the_training_began_from_is_refused():
    with pytest.raises(KvcalError, match="pool 'first': the stage's trained weights began from pool 'mean'"):
        resolve(Cla(pool="first"), artifact(TRAINED))
    assert resolve(Cla(), artifact(TRAINED, pool="first")).weights


@pytest.mark.parametrize(("name", "value"), [("pool", "median"), ("uptrained", 1)])
def test_parameters_that_mean_nothing_are_refused(name, value):
    with pytest.raises(KvcalError, match=name):
        resolve(replace(Cla("0-1"), **{name: value}), None)


def test_layers_of_a_group_have_one_method():
    full, loki = METHODS["full"](), METHODS["loki"]()
    check_methods(SharingMap(((0, 1), (2,))), {0: full, 1: full, 2: loki}, None)
    with pytest.raises(KvcalError, match="layers 0 and 1 share one cache: give them the same method"):
        check_methods(SharingMap(((0, 1),)), {0: full, 1: loki}, None)


def test_what_one_layers_queries_made_is_refused():
    groups = SharingMap(((0, 1), (2,)))
    for method, message in (
        (METHODS["loki"](basis="score"), "layers 0, 1 share .* basis 'score' is fitted to the queries of one layer"),
        (METHODS["spectral"](), "layers 0, 1 share .* spectral's codebooks are of one layer's own keys and values"),
        (METHODS["full"](record_mass=True), "record_mass"),
    ):
        with pytest.raises(KvcalError, match=message):
            check_methods(groups, dict.fromkeys(range(3), method), None)
    # A layer of its own may.
    check_methods(groups, {0: METHODS["full"](), 1: METHODS["full"](), 2: METHODS["loki"](basis="score")}, None)


def test_a_basis_of_every_storing_layer_is_wanted():
    method, groups = METHODS["loki"](basis="pca"), SharingMap(((0, 1), (2,)))
    bases = {f"layers.{layer}.key_post.components": BASIS for layer in (0, 2)}
    check_methods(groups, dict.fromkeys(range(3), method), bases)
    for lacking in ({}, {"layers.0.key_post.components": BASIS}):
        message = "^loki needs .* `calibrate share ARTIFACT --model M --data D --steps N --uptrain`"
        with pytest.raises(KvcalError, match=message):
            check_methods(groups, dict.fromkeys(range(3), method), lacking)
    check_methods(groups, dict.fromkeys(range(3), METHODS["quest"]()), {})
    with pytest.raises(KvcalError, match=r"^spectral has no codebooks of keys that uptraining changed: take loki "):
        check_methods(SharingMap(((0,), (1,))), dict.fromkeys(range(2), METHODS["spectral"]()), bases)


def test_methods_see_the_bases_of_the_shared_keys_and_no_other_fits():
    view = with_bases(artifact(TRAINED), {"layers.0.key_post.components": BASIS})
    assert view.tensor("pca", 0, "key_post.components") is BASIS
    assert {"moments", "score", "clusters", "codebook", "reservoir"} & view.stages.keys() == set()
    with pytest.raises(KvcalError):
        view.tensor("pca", 1, "key_post.components")


def test_trained_weights_that_are_not_there_are_refused_when_asked_for():
    for groups, of in ((None, artifact()), ("0,1", artifact(TRAINED)), ("0-1", samples.artifact())):
        with pytest.raises(KvcalError, match="uptrained=True: the artifact has no trained weights for groups"):
            resolve(Cla(groups, uptrained=True), of)
        assert not resolve(Cla(groups), of).weights
