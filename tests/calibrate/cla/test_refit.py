"""Refit bases against numpy's eigenvectors of the keys that hooks on the projections see."""

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, HEAD_DIM, KV_HEADS, build
from cla_oracle import inventory
from cla_samples import GROUPS, blocks, train
from compressed import artifact, model

from kvcal.artifacts import Artifact, KvcalError, Stage, load, save
from kvcal.calibrate.cla.refit import refit_keys
from kvcal.calibrate.cla.uptrained_stage import finished_run, with_uptraining
from kvcal.runtime import check_model, compress
from kvcal.runtime.cla import SharingMap, shared
from kvcal.runtime.cla.method import stage_map

TEXT = blocks(count=6, length=21)  # the oracle of architectures takes rows of 21


def keys_seen(of, weights, quantity):
    """{layer: [Hkv, n, D]} of the tokens that count."""
    with shared(of, GROUPS, weights=weights):
        ids, mask = TEXT.ids.long(), TEXT.attended.long()
        found = ARCHITECTURES["llama"].oracle(of, lambda: of(ids, attention_mask=mask, use_cache=False))
    return {layer: found[layer][quantity].transpose(0, 1)[:, TEXT.counted].detach().double() for layer in (0, 2)}


@pytest.mark.parametrize("centred", [True, False])
def test_bases_are_those_of_the_shared_keys(centred):
    of = build("llama")
    weights = train(of, steps=3, lr=1e-2).weights
    before = inventory(of)
    bases = refit_keys(of, GROUPS, weights, TEXT, centred=centred, batch_size=4)
    assert inventory(of) == before
    assert {name.split(".")[1] for name in bases} == {"0", "2"}  # storing layers, the one by itself, too
    for stage in ("key_pre", "key_post"):
        for layer, heads in keys_seen(of, weights, stage).items():
            prefix = f"layers.{layer}.{stage}"
            for head, rows in enumerate(heads.numpy()):
                matrices = {"eigenvalues": np.cov(rows.T), "eigenvalues_uncentred": rows.T @ rows / len(rows)}
                for name, matrix in matrices.items():
                    expected = np.linalg.eigvalsh(matrix)[::-1]
                    np.testing.assert_allclose(bases[f"{prefix}.{name}"][head], expected, rtol=1e-4, atol=1e-6)
                np.testing.assert_allclose(bases[f"{prefix}.mean"][head], rows.mean(0), rtol=1e-4, atol=1e-5)
                components = bases[f"{prefix}.components"][head].double().numpy()
                kept = components @ matrices["eigenvalues" if centred else "eigenvalues_uncentred"] @ components.T
                values = bases[f"{prefix}.{'eigenvalues' if centred else 'eigenvalues_uncentred'}"][head].numpy()
                np.testing.assert_allclose(kept, np.diag(values), atol=1e-4 * values[0])


@pytest.fixture(scope="module")
def uptrained(tmp_path_factory) -> Artifact:
    """Saved and loaded again."""
    of, calibrated = model(), artifact()
    cla = {f"layers.{layer}.{name}": torch.zeros(3, dtype=torch.float64) for layer in range(3) for name in MEASURES}
    stage = Stage(cla, {"groups": str(GROUPS), "pattern": "list", "pool": "mean", "uptraining": None})
    result = train(of, pool="first")
    found = with_uptraining(calibrated.with_stage("cla", stage), result, refit_keys(of, GROUPS, result.weights, TEXT))
    return save(found, tmp_path_factory.mktemp("artifacts") / "a")


MEASURES = ("key_r2", "key_r2_unaligned", "value_r2", "value_r2_unaligned", "cost_as_is", "cost_aligned")


def test_the_stage_comes_back_from_the_disk_as_it_was(uptrained):
    loaded, of = load(uptrained.folder), model()
    result = train(of, pool="first")
    stage = loaded.stages["cla"]
    assert {name.removeprefix("weights.") for name in stage.tensors if name.startswith("weights.")} == set(
        result.weights
    )
    assert all(torch.equal(stage.tensors[f"weights.{name}"], weight) for name, weight in result.weights.items())
    assert stage.settings["pool"] == "first" and stage.settings["uptraining"] == result.settings
    assert finished_run(loaded) == result.settings["run"] and stage_map(loaded) == GROUPS
    assert loaded.tensor("cla", 0, "key_post.components").shape == (KV_HEADS, HEAD_DIM, HEAD_DIM)
    check_model(loaded, of, weights=True)


def test_a_second_training_takes_the_place_of_the_first(uptrained):
    result = train(model(), steps=2)
    again = with_uptraining(uptrained, result, {})
    names = set(again.stages["cla"].tensors)
    assert names == {f"weights.{name}" for name in result.weights} | {
        f"layers.{layer}.{name}" for layer in range(3) for name in MEASURES
    }


def test_the_runtime_decodes_with_the_trained_weights_and_refit_bases(uptrained):
    of, ids = model(), torch.arange(3, 43).unsqueeze(0)
    weights = {
        n.removeprefix("weights."): t for n, t in uptrained.stages["cla"].tensors.items() if n.startswith("weights.")
    }
    with shared(of, GROUPS, weights=weights), torch.no_grad():
        expected = of(ids, use_cache=False).logits[:, -1]
    for method in ("cla", "cla+loki"):
        with compress(of, uptrained, method=method), torch.no_grad():
            past = of(ids[:, :-1], use_cache=True).past_key_values
            found = of(ids[:, -1:], past_key_values=past, use_cache=True).logits[:, -1]
        close = {"rtol": 1e-4, "atol": 1e-4} if method == "cla" else {"rtol": 0, "atol": 1.0}
        torch.testing.assert_close(found, expected, **close)


def test_other_groups_than_the_stages_are_refused(uptrained):
    other = train(model(), sharing_map=SharingMap.parse("0,1-2"), steps=1)
    with pytest.raises(KvcalError, match=r"shares 0-1,2, the training 0,1-2"):
        with_uptraining(uptrained, other, {})
    with pytest.raises(KvcalError, match="no stage cla"):
        with_uptraining(artifact(), other, {})
