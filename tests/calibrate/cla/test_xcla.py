"""The stage `xcla`: memory, groups, what it is derived from, and a file that a stranger wrote."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from architectures import build

from kvcal.artifacts import Artifact, ArtifactError, KvcalError, Stage, load, save
from kvcal.calibrate.blocks import TokenBlocks
from kvcal.calibrate.cla.group_sample import GroupSample
from kvcal.calibrate.cla.rotation import angles_of
from kvcal.calibrate.cla.xcla import groups_of, xcla, xcla_report
from kvcal.calibrate.one_pass import calibrate
from kvcal.calibrate.verification import verify


def calibrated(name: str = "llama", **settings: Any) -> tuple[Any, Artifact]:
    model = build(name)
    ids = torch.randint(3, 96, (8, 64), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    whole = torch.ones_like(ids, dtype=torch.bool)
    return model, calibrate(model, TokenBlocks(ids, whole, whole, {"id": "random"}), **{"reservoir": 400, **settings})


@pytest.fixture(scope="module")
def coded() -> Artifact:
    model, found = calibrated()
    return xcla(found, angles=angles_of(found, model), group=2, memory=0.4)


@pytest.mark.parametrize("name", ["llama", "llama-yarn", "gpt-neox", "gemma3"])
def test_angles_are_the_models(name: str) -> None:
    """inv_freq of its rotary module, by which it computes cos and sin."""
    model, found = calibrated(name)
    modules = [module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]
    known = [
        getattr(module, attribute)
        for module in modules
        for attribute in ("inv_freq", "full_attention_inv_freq")
        if hasattr(module, attribute)
    ]
    angles = angles_of(found, model)
    assert any(len(of) == len(angles) and torch.allclose(of.double(), angles, rtol=1e-5) for of in known)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_angles_are_found_in_what_16_bits_leave(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a block of 8192 tokens and 64 planes; cos and sin rounded as a model of 16 bits hands them over."""
    from kvcal.calibrate.cla import rotation

    expected = 10000.0 ** -(torch.arange(64, dtype=torch.float64) / 64)
    angle = torch.arange(8192, dtype=torch.float64).unsqueeze(1) * expected
    given = tuple(part.repeat(1, 2).to(dtype).float() for part in (angle.cos(), angle.sin()))
    monkeypatch.setattr(rotation, "block_rotation", lambda *ignored: given)
    found = angles_of(calibrated()[1], None)
    off = 8191 * (found - expected).abs()
    assert off.max() < 0.02


def test_models_without_a_rotation_have_no_angles() -> None:
    model, found = calibrated("gpt2")
    assert len(angles_of(found, model)) == 0
    report = xcla_report(xcla(found, angles=angles_of(found, model), memory=0.5))
    assert report["memory"] <= 0.5


def test_what_yarn_makes_longer_costs_more() -> None:
    """Of keys as they are held, once more by the rotary module's own factor; queries were measured without it."""
    model, found = calibrated("llama-yarn")
    (factor,) = {
        float(module.attention_scaling)
        for module in model.modules()
        if type(module).__name__.endswith("RotaryEmbedding")
    }
    (layer,) = groups_of(found, 1)[0]
    (rows,) = GroupSample(found, [layer], angles_of(found, model))._rows("key")
    moments = (found.tensor("moments", layer.index, f"query_pre.{part}") for part in ("mean", "covariance"))
    mean, covariance = moments
    second = covariance + mean.unsqueeze(-1) * mean.unsqueeze(-2)
    assert factor > 1.01
    torch.testing.assert_close(rows.metric, (layer.scaling * factor) ** 2 * second, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("memory", [0.25, 0.4, 0.6])
@pytest.mark.parametrize("group", [1, 2, 3])
def test_memory_is_what_was_asked_for(group: int, memory: float) -> None:
    """By what the cache of a model then holds."""
    model, found = calibrated()
    stage = xcla(found, angles=angles_of(found, model), group=group, memory=memory)
    report = xcla_report(stage)
    assert 0.6 * memory <= report["memory"] <= memory  # in steps of 8 of 16 dimensions
    widths = [stage.tensor("xcla", layer, f"{kind}.counts") for layer in range(3) for kind in ("key", "value")]
    bits = sum(int((counts * torch.tensor([8, 4, 2])).sum()) // 8 + 2 * int((counts > 0).sum()) for counts in widths)
    assert report["bytes_per_token"] == {"before": 3 * 2 * 2 * 32, "after": 2 * bits}
    groups = {1: [[], [], []], 2: [[], [0], []], 3: [[], [0], [0, 1]]}
    assert [layer["earlier"] for layer in report["layers"]] == groups[group]
    assert (report["read"] > report["memory"]) == (group > 1)
    for layer in report["layers"]:
        for kind in ("key", "value"):
            assert 0 <= layer[kind]["lost"] < 1 and (layer[kind]["told"] > 0) == bool(layer["earlier"])


def test_more_memory_loses_less() -> None:
    model, found = calibrated()
    lost = []
    for memory in (0.2, 0.35, 0.6):
        report = xcla_report(xcla(found, angles=angles_of(found, model), group=2, memory=memory))
        lost.append(sum(layer[kind]["lost"] for layer in report["layers"] for kind in ("key", "value")))
    assert lost[0] > lost[1] > lost[2]


def test_groups_are_of_layers_with_full_attention() -> None:
    model, found = calibrated("gemma3")  # one full layer between two that slide
    report = xcla_report(xcla(found, angles=angles_of(found, model), memory=0.5))
    assert [layer["layer"] for layer in report["layers"]] == [1] and report["groups"] == "1"


def test_the_same_again_is_the_same(coded: Artifact) -> None:
    model, found = calibrated()
    again = xcla(found, angles=angles_of(found, model), group=2, memory=0.4)
    assert again.stages["xcla"].tensors.keys() == coded.stages["xcla"].tensors.keys()
    for name, tensor in again.stages["xcla"].tensors.items():
        assert torch.equal(tensor, coded.stages["xcla"].tensors[name]), name


def test_what_cannot_be_is_refused() -> None:
    model, found = calibrated()
    angles = angles_of(found, model)
    with pytest.raises(
        KvcalError, match=r"memory 0\.01: the least that codes take here is 0\.\d+: give at least as much"
    ):
        xcla(found, angles=angles, memory=0.01)
    with pytest.raises(KvcalError, match="group 0: give at least 1 layer"):
        xcla(found, angles=angles, group=0)
    few = calibrated(reservoir=8)[1]
    with pytest.raises(KvcalError, match="a reservoir of 8 tokens, codes are fitted to at least 32: calibrate again"):
        xcla(few, angles=angles)
    sliding = dataclasses.replace(found, layers=tuple(dataclasses.replace(of, window=8) for of in found.layers))
    with pytest.raises(KvcalError, match="all layers have a sliding window: there is nothing to code"):
        xcla(sliding, angles=angles)


def test_a_rotation_that_is_not_even_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvcal.calibrate.cla import rotation

    model, found = calibrated()
    angle = torch.arange(64).unsqueeze(1) ** 1.5 * torch.logspace(0, -2, 8)
    uneven = tuple(part.repeat(1, 2) for part in (angle.cos(), angle.sin()))
    monkeypatch.setattr(rotation, "block_rotation", lambda *ignored: uneven)
    with pytest.raises(KvcalError, match="does not turn by the same angle at every position"):
        angles_of(found, model)


def test_it_is_saved_loaded_and_verified(coded: Artifact, tmp_path: Any) -> None:
    found = load(save(coded, tmp_path / "a").folder)
    assert xcla_report(found) == xcla_report(coded)
    verify(found)


def changed(coded: Artifact, name: str, tensor: torch.Tensor) -> Artifact:
    stage = coded.stages["xcla"]
    return coded.with_stage("xcla", Stage({**stage.tensors, name: tensor}, stage.settings))


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("layers.1.earlier", lambda of: torch.tensor([2]), "an earlier layer with as many KV heads"),
        ("layers.1.earlier", lambda of: torch.tensor([-1]), "an earlier layer with as many KV heads"),
        ("layers.2.earlier", lambda of: torch.tensor([1]), "those of layer 1"),
        ("layers.0.key.counts", lambda of: of + 4, "1 to 16 in all|coefficients, expected"),
        ("layers.0.key.counts", lambda of: of - of, "expected 1 to 16 in all"),
        ("layers.0.key.counts", lambda of: of.index_fill(0, torch.tensor([0]), -4), "a multiple of 4, 0 to 16"),
        ("layers.1.value.back", lambda of: of[:, 1:].contiguous(), "as counts of the group's layers tell"),
        ("layers.0.value.basis", lambda of: of * torch.nan, "a number from"),
        ("layers.0.key.offset", lambda of: of + torch.inf, "a number from"),
        ("layers.0.lost", lambda of: of - 2, "a number from 0"),
        ("angles", lambda of: torch.cat((of, of)), "at most 8"),
        ("angles", lambda of: of * 9, "a number from -3.14"),
    ],
)
def test_a_strangers_stage_is_refused(coded: Artifact, tmp_path: Any, name: str, change: Any, told: str) -> None:
    stated = changed(coded, name, change(coded.stages["xcla"].tensors[name]))
    with pytest.raises(ArtifactError, match=told) as caught:
        save(stated, tmp_path / "a")  # which loads what it wrote
    assert "\n" not in str(caught.value)


def test_codes_of_other_keys_are_found_out(coded: Artifact, tmp_path: Any) -> None:
    basis = coded.stages["xcla"].tensors["layers.1.key.basis"]
    found = load(save(changed(coded, "layers.1.key.basis", basis.flip(1).contiguous()), tmp_path / "a").folder)
    with pytest.raises(ArtifactError, match=r"layers\.1\.lost.*expected what the reservoir loses"):
        verify(found)
