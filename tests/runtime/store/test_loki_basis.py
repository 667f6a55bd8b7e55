"""From an artifact's tensors to what Loki scores with."""

from __future__ import annotations

import dataclasses

import pytest
import samples
import torch
from oracles import loki
from sequences import Geometry, assert_steps, decode, draw, prefill
from torch import Tensor

from kvcal.artifacts import Artifact, KvcalError
from kvcal.runtime.attention import SoftmaxSpec
from kvcal.runtime.methods.loki import Loki
from kvcal.runtime.settings import new_store

GEOMETRY = Geometry(12, 5, 2, 2)
ARTIFACT = samples.artifact(layers=2, head_dim=12, value_dim=5)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("basis", ["pca", "score"])
@pytest.mark.parametrize("stage", ["pre", "post"])
def test_which_tensors(stage: str, basis: str, layer: int) -> None:
    """Rows of the artifact's maps, of that layer and stage, whatever the stage to post-rotary queries and keys."""
    if basis == "pca":
        names = [f"layers.{layer}.key_{stage}.components"] * 2
    else:
        names = [f"layers.{layer}.{stage}.{side}_map" for side in ("query", "key")]
    query_map, key_map = (ARTIFACT.stages[basis].tensors[name][:, :3] for name in names)
    rows, spec = draw(GEOMETRY, (9, 30), 3), SoftmaxSpec(GEOMETRY.scaling)
    store = new_store(
        Loki(rank=3, keep=0.25, stage=stage, basis=basis, select="head", sinks=0, recent=0).bind(layer, 12, ARTIFACT)
    )
    prefill(store, rows, spec)
    for row, got in zip(rows, decode(store, rows, spec), strict=True):
        assert_steps(got, loki(row, spec, query_map, key_map, keep=0.25))


@pytest.mark.parametrize(("rank", "expected"), [(0.25, 3), (0.3, 4), (1.0, 12), (0.01, 1), (1, 1), (12, 12), (7, 7)])
def test_rank_is_a_fraction_or_a_count(rank: float, expected: int) -> None:
    assert scored(ARTIFACT, rank=rank) == expected


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("stage", ["pre", "post"])
def test_rank_by_variance(stage: str, share: float) -> None:
    for layer in (0, 1):
        prefix = f"layers.{layer}"
        eigenvalues = ARTIFACT.stages["pca"].tensors[f"{prefix}.key_{stage}.eigenvalues"]
        assert scored(ARTIFACT, layer, rank=f"variance:{share}", stage=stage) == brute_force(eigenvalues, share)
        # The score basis is ordered by singular values, whose squares add up to the expected squared error.
        squares = torch.rand(2, 12, dtype=torch.float64).sort(-1, descending=True).values
        ordered = with_tensor("score", f"{prefix}.{stage}.singular_values", squares.sqrt())
        rank = scored(ordered, layer, rank=f"variance:{share}", stage=stage, basis="score")
        assert rank == brute_force(squares, share)


def test_rank_by_variance_reaches_equal_parts() -> None:
    """3 of 10 equal parts are 0.3, whatever floating point adds them up to."""
    equal = torch.full((2, 12), 0.1, dtype=torch.float64)
    artifact = with_tensor("pca", "layers.0.key_post.eigenvalues", equal)
    assert [scored(artifact, rank=f"variance:{part / 12!r}") for part in range(1, 13)] == list(range(1, 13))


def test_rank_by_variance_of_an_uncentred_basis() -> None:
    """Components of E[k kᵀ] are ordered by its eigenvalues, not by those of the covariance."""
    eigenvalues = 0.5 ** torch.arange(12, dtype=torch.float64).expand(2, 12)
    steep = with_tensor("pca", "layers.0.key_post.eigenvalues_uncentred", eigenvalues)
    uncentred = dataclasses.replace(steep, settings={**ARTIFACT.settings, "centred": False})
    for share in (0.3, 0.5, 0.9):
        assert scored(uncentred, rank=f"variance:{share}") == brute_force(eigenvalues, share)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 13}, "rank 13 is above the head dim 12"),
        ({"rank": 0}, "rank 0: "),
        ({"rank": 1.5}, "rank 1.5: "),
        ({"rank": True}, "rank True: "),
        ({"rank": "variance:0"}, "rank 'variance:0': "),
        ({"rank": "variance:1.1"}, "rank 'variance:1.1': "),
        ({"rank": "variance:nan"}, "rank 'variance:nan': "),
        ({"rank": "0.5"}, "rank '0.5': "),
        ({"stage": "mid"}, "stage 'mid': give pre or post"),
        ({"basis": "svd"}, "basis 'svd': give pca or score"),
        ({"select": "layer"}, "select 'layer': give head or group"),
    ],
    ids=str,
)
def test_refused(settings: dict, message: str) -> None:
    with pytest.raises(KvcalError, match=f"^{message}[^\n]*$"):
        Loki(**settings).bind(0, 12, ARTIFACT)


@pytest.mark.parametrize("basis", ["pca", "score"])
def test_missing_stage(basis: str) -> None:
    stages = {name: stage for name, stage in ARTIFACT.stages.items() if name != basis}
    with pytest.raises(KvcalError, match=rf"^[^\n]*{basis}[^\n]*$"):
        Loki(basis=basis).bind(0, 12, dataclasses.replace(ARTIFACT, stages=stages))


def scored(artifact: Artifact, layer: int = 0, **settings: object) -> int:
    """Dimensions that are read of each key at a step, from the bytes."""
    (row,) = draw(GEOMETRY, [39], 1)
    settings = {"basis": "pca", "select": "head", **settings}
    store = new_store(Loki(keep=1, sinks=0, recent=0, **settings).bind(layer, 12, artifact))
    prefill(store, [row], SoftmaxSpec(1.0))
    decode(store, [row], SoftmaxSpec(1.0))
    rows_read, basis = GEOMETRY.heads * (12 + 5) * 4, store.policy.basis.rank
    if settings["basis"] == "score":
        per_rank = 2 * 40 * 4 + 2 * 2 * 12 * 4  # index and both maps
        assert store.bytes_read() - rows_read == per_rank * basis
    else:
        assert store.bytes_read() - rows_read - 2 * 12 * 12 * 4 == 2 * 40 * 4 * basis
    return basis


def brute_force(spectrum: Tensor, share: float) -> int:
    """Count up, head by head, until every one has its share."""
    return next(
        rank
        for rank in range(1, spectrum.shape[-1] + 1)
        if all(sum(head[:rank]) >= share * sum(head) - 1e-12 for head in spectrum.tolist())
    )


def with_tensor(stage: str, name: str, tensor: Tensor) -> Artifact:
    changed = {**ARTIFACT.stages[stage].tensors, name: tensor}
    return dataclasses.replace(
        ARTIFACT, stages={**ARTIFACT.stages, stage: dataclasses.replace(ARTIFACT.stages[stage], tensors=changed)}
    )
