"""A model's rotation at the reservoir's positions: undone, sampled keys are what the model's pass had before it."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES, build
from architectures import rotate as turn

from kvcal.calibrate import TokenBlocks, calibrate
from kvcal.calibrate.capture import capture
from kvcal.calibrate.cla.rotation import rotate, rotation_of, unrotate


def calibrated(name):
    model = build(name)
    ids = torch.randint(3, 96, (3, 21), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    whole = torch.ones_like(ids, dtype=torch.bool)
    blocks = TokenBlocks(ids, whole, whole, {"id": "random"})
    return model, blocks, calibrate(model, blocks, reservoir=40)


@pytest.mark.parametrize("name", ["llama", "llama-yarn", "gpt-neox", "phi3", "gemma3"])
def test_keys_before_their_rotation(name):
    model, blocks, artifact = calibrated(name)
    cos, sin = rotation_of(artifact, model)
    seen = {}
    with torch.no_grad(), capture(model, lambda layer: seen.setdefault(layer.layer, layer)):
        model(input_ids=blocks.ids.long())
    token = artifact.stages["reservoir"].tensors["token"]
    for layer in artifact.layers:
        if layer.window is not None:
            continue
        before = seen[layer.index].key_pre.transpose(0, 1).flatten(1, 2)[:, token]
        after = artifact.tensor("reservoir", layer.index, "key_post")
        torch.testing.assert_close(unrotate(after, (cos, sin)), before, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rotate(before, (cos, sin)), after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama-yarn"])
def test_rotating_is_the_product_of_complex_numbers(name):
    model, _, artifact = calibrated(name)
    cos, sin = rotation_of(artifact, model)
    keys = torch.randn(2, len(cos), 16, generator=torch.Generator().manual_seed(1))
    expected = turn(keys.unsqueeze(0), cos.unsqueeze(0), sin.unsqueeze(0), interleaved=False)[0]
    torch.testing.assert_close(rotate(keys, (cos, sin)), expected, rtol=1e-5, atol=1e-5)


def test_models_without_a_rotation_have_none():
    assert not ARCHITECTURES["gpt2"].rotary
    model, _, artifact = calibrated("gpt2")
    assert rotation_of(artifact, model) is None


def test_the_model_is_left_as_found():
    model, _, artifact = calibrated("llama")
    before = {name: module._forward_pre_hooks.copy() for name, module in model.named_modules()}
    rotation_of(artifact, model)
    assert {name: module._forward_pre_hooks for name, module in model.named_modules()} == before
