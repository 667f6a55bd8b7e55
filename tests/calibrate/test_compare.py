"""Whether two artifacts hold the same tensors; the angles between their subspaces are tested with the commands."""

import pytest
import samples

from kvcal.artifacts import Stage, load, save
from kvcal.calibrate.cla import share
from kvcal.calibrate.compare import compare

NAME = "layers.1.cost_aligned"


@pytest.fixture(scope="module")
def shared():
    """Its stage `cla` has NaN for pairs that were not measured."""
    return share(samples.artifact(tokens=90))


def changed(artifact, tensor):
    stage = artifact.stages["cla"]
    return artifact.with_stage("cla", Stage({**stage.tensors, NAME: tensor}, stage.settings))


def test_an_artifact_is_the_same_as_itself_and_as_it_was_written(tmp_path, shared):
    assert shared.stages["cla"].tensors[NAME].isnan().any()
    for other in (shared, load(save(shared, tmp_path / "a").folder)):
        assert compare(shared, other)["same_tensors"]


def test_any_other_number_shape_or_type_is_a_difference(shared):
    cost = shared.stages["cla"].tensors[NAME]
    for other in (cost.nan_to_num(0), cost * (1 + 1e-12), cost[:1], cost.float()):
        assert not compare(shared, changed(shared, other))["same_tensors"]
    assert not compare(shared, samples.artifact(tokens=90))["same_tensors"]
