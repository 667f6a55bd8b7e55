"""Captured tensors against the layer's own projections, recorded by hooks, and the rotation written out."""

import pytest
import torch
from architectures import ARCHITECTURES, build

from kvcal.artifacts import KvcalError
from kvcal.calibrate.capture import capture
from kvcal.runtime.integration.support import find_attention

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def inputs(model, rows=2, tokens=21, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.get_text_config().vocab_size, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0  # left padding
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


@torch.no_grad()
def run(model, observe=None, **kwargs):
    if observe is None:
        return model(**inputs(model, **kwargs)).logits
    with capture(model, observe):
        return model(**inputs(model, **kwargs)).logits


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pre_and_post_rotary_equal_an_independent_computation(name):
    model = build(name)
    seen = []
    expected = ARCHITECTURES[name].oracle(model, lambda: run(model))
    run(model, seen.append)
    assert [tensors.layer for tensors in seen] == list(range(len(expected)))
    for tensors, oracle in zip(seen, expected, strict=True):
        for quantity in ("query_pre", "key_pre", "query_post", "key_post", "value"):
            torch.testing.assert_close(getattr(tensors, quantity), oracle[quantity], **TOLERANCE, msg=quantity)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_bit_identical_under_capture_and_after(name, attention):
    model = build(name, attention)
    before = run(model)
    during = run(model, lambda tensors: None)
    assert torch.equal(before, during)
    assert torch.equal(before, run(model))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_model_is_left_as_found_after_an_exception(name):
    model = build(name)
    before = run(model)
    implementation = model.config._attn_implementation

    def fail(tensors):
        raise RuntimeError("from the observer")

    with pytest.raises(RuntimeError, match="from the observer"):
        run(model, fail)
    assert model.config._attn_implementation == implementation
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(before, run(model))


def test_capture_sees_only_its_own_model():
    model, other = build("llama"), build("mistral")
    seen = []
    with torch.no_grad(), capture(model, seen.append):
        other(**inputs(other))
    assert seen == []


def test_nested_capture_of_one_model_is_refused():
    model = build("llama")
    with capture(model, lambda tensors: None), pytest.raises(KvcalError, match="already being captured"):
        run(model, lambda tensors: None)
    run(model)


@pytest.mark.parametrize("name", ["llama", "cohere"])
def test_later_batches_use_what_the_first_one_taught(name):
    """Llama is rotated back; Cohere's interleaved rotation is not ours, so it goes on being replayed."""
    model = build(name)
    seen = []
    with torch.no_grad(), capture(model, seen.append) as pre_rotary:
        for seed in (1, 2):
            model(**inputs(model, seed=seed))
    assert set(pre_rotary.methods.values()) == {"unrotate" if name == "llama" else "replay"}
    expected = ARCHITECTURES[name].oracle(model, lambda: run(model, seed=2))
    for tensors, oracle in zip(seen[len(expected) :], expected, strict=True):
        torch.testing.assert_close(tensors.key_pre, oracle["key_pre"], **TOLERANCE)
        torch.testing.assert_close(tensors.query_pre, oracle["query_pre"], **TOLERANCE)


def test_scaling_and_window_are_those_of_the_layer():
    gemma = build("gemma3")
    seen = []
    run(gemma, seen.append)
    types = gemma.config.get_text_config().layer_types
    assert {"sliding_attention", "full_attention"} <= set(types)
    for tensors, kind in zip(seen, types, strict=True):
        assert tensors.window == (8 if kind == "sliding_attention" else None)
        assert tensors.scaling == pytest.approx(gemma.config.get_text_config().query_pre_attn_scalar ** -0.5)


def test_architectures_outside_the_interface_are_refused_by_name():
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(KvcalError, match=r"FalconForCausalLM.*layers \[0, 1\].*not supported"):
        find_attention(FalconForCausalLM(config))


@pytest.mark.parametrize("name", ["llama", "cohere", "gpt2", "gpt-neox"])
def test_a_forward_that_fills_a_cache_is_unchanged_and_the_cache_too(name):
    """The replay must not append to the cache."""
    model = build(name)
    given = {**inputs(model), "use_cache": True}
    with torch.no_grad():
        before = model(**given)
        with capture(model, lambda tensors: None):
            during = [model(**given) for _ in range(2)]
    for found in during:
        assert torch.equal(found.logits, before.logits)
        assert found.past_key_values.get_seq_length() == given["input_ids"].shape[1]


def test_decoding_with_a_cache_is_refused():
    model = build("llama")
    with torch.no_grad():
        cache = model(**{**inputs(model), "use_cache": True}).past_key_values
        with capture(model, lambda tensors: None), pytest.raises(KvcalError, match="22 keys for 1 queries"):
            model(input_ids=torch.full((2, 1), 5), past_key_values=cache)


def test_captures_of_two_models_do_not_meet():
    first, second = build("llama"), build("qwen3")
    seen = {"first": [], "second": []}
    with torch.no_grad(), capture(first, seen["first"].append):
        with capture(second, seen["second"].append):
            first(**inputs(first))
        assert (len(seen["first"]), len(seen["second"])) == (3, 0)
        first(**inputs(first))
    assert (len(seen["first"]), len(seen["second"])) == (6, 0)


def test_a_rotary_embedding_that_is_not_cos_and_sin_is_refused():
    """Llama 4 passes complex numbers; a layer recorded as having no rotary embedding would be wrong silently."""
    import inspect

    from kvcal.calibrate.pre_rotary import find_rotation

    layer = build("llama").model.layers[0].self_attn
    for given in (None, torch.ones(2, 3, dtype=torch.complex64), (torch.ones(1, dtype=torch.complex64),) * 2):
        call = inspect.signature(layer.forward).bind(torch.zeros(1), position_embeddings=given)
        with pytest.raises(KvcalError, match="LlamaAttention: its rotary embedding"):
            find_rotation(layer, call, expected=True)
    assert find_rotation(layer, inspect.signature(layer.forward).bind(torch.zeros(1)), expected=False) is None
    cos, sin = torch.ones(1, 2, 4), torch.zeros(1, 2, 4)
    assert find_rotation(layer, inspect.signature(layer.forward).bind(torch.zeros(1), (cos, sin)), True) == (cos, sin)
