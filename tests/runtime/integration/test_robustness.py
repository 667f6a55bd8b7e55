"""What a review broke: encoders beside the decoder, other modes, half-finished calls, copies, hand-made crops."""

import pytest
import torch
import transformers
from architectures import build
from compressed import CLOSE, SMALL, make_cache, model, random_ids

from kvcal.runtime import METHODS, CompressedCache, KvcalError, compress

IDS = random_ids(24)


def test_an_encoder_beside_the_decoder_keeps_its_own_attention():
    text = build("gemma3").config
    vision = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4
    )
    parts = {"text_config": text.to_dict(), "vision_config": vision.to_dict()}
    config = transformers.Gemma3Config(**parts, mm_tokens_per_image=4)
    torch.manual_seed(0)
    both = transformers.Gemma3ForConditionalGeneration(config).eval()
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        expected = both.model.vision_tower(pixels).last_hidden_state
        with compress(both, None, "streaming", keep=8):
            torch.testing.assert_close(both.model.vision_tower(pixels).last_hidden_state, expected)
            both.generate(IDS, max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("method", METHODS)
def test_a_cache_filled_in_inference_mode_goes_on_outside_it(method):
    cache, plain = make_cache(method), make_cache(method)
    with torch.inference_mode():
        model()(IDS, past_key_values=cache)
    with torch.no_grad():
        model()(IDS, past_key_values=plain)
        for token in random_ids(3, seed=3).split(1, 1):
            found, expected = (model()(token, past_key_values=each).logits for each in (cache, plain))
            torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_a_crop_by_hand_does_not_turn_the_next_prompt_into_guesses():
    cropped, plain = make_cache("loki"), make_cache("loki")
    model()(IDS, past_key_values=cropped)
    cropped.crop(-1)
    model()(IDS[:, :-1], past_key_values=plain)
    turn = random_ids(12, seed=4)
    found, expected = (model()(turn, past_key_values=cache, logits_to_keep=8).logits for cache in (cropped, plain))
    torch.testing.assert_close(found, expected, **CLOSE)


@torch.no_grad()
def test_a_call_that_failed_half_way_is_told_of():
    cache = make_cache("loki")
    model()(IDS, past_key_values=cache)
    layer = model().model.layers[1]
    handle = layer.mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model()(IDS[:, :1], past_key_values=cache)
    handle.remove()
    with pytest.raises(KvcalError, match="ended half-way, its layers hold 24 to 25 tokens: begin a new cache"):
        model()(IDS[:, :1], past_key_values=cache)


def test_making_caches_costs_no_forward_calls_and_no_random_numbers():
    trained = build("gpt2").train()
    calls = []
    trained.transformer.register_forward_hook(lambda *_: calls.append(1))
    before = torch.get_rng_state()
    for _ in range(3):
        CompressedCache(trained, None, "streaming")
    # A prompt and a step, watched when the first is made.
    assert len(calls) == 2 and torch.equal(torch.get_rng_state(), before)


def test_dropout_of_a_training_step_stays():
    trained = build("gpt2")
    trained.config.attn_pdrop = 0.5
    for block in trained.transformer.h:
        block.attn.attn_dropout.p = 0.5
    trained.train()
    with compress(trained, None, "streaming"):
        first, second = (trained(IDS, use_cache=False).logits for _ in range(2))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("part", ["", "model.layers.1"])
def test_gradient_checkpointing_that_would_leave_out_a_cache(part):
    trained = build("llama")
    expected = trained(IDS, use_cache=False).logits
    trained.gradient_checkpointing_enable()
    trained.get_submodule(part).train()
    cache = CompressedCache(trained, None, "full")
    refused = pytest.raises(KvcalError, match="trains with gradient checkpointing leaves out its cache: call model")
    with refused:
        trained(IDS, past_key_values=cache)
    with compress(trained, None, "full"):
        with torch.no_grad(), refused:
            trained(IDS)
        torch.testing.assert_close(trained(IDS, use_cache=False).logits, expected)
        trained.eval()
        trained(IDS, past_key_values=cache)
    assert cache.get_seq_length() == IDS.shape[1]


def test_disable_inside_the_context_and_its_own_error():
    from kvcal.runtime.integration import disable

    fresh = build("llama")
    with pytest.raises(ZeroDivisionError), compress(fresh, None, "full"):
        disable(fresh)
        raise ZeroDivisionError
    assert not fresh._forward_pre_hooks


def test_caches_that_transformers_would_offload_or_that_are_none_are_refused():
    with compress(model(), None, "full"):
        with pytest.raises(KvcalError, match="past_key_values is a tuple"):
            model()(IDS, past_key_values=((torch.zeros(1),),))
        with pytest.raises(KvcalError, match="past_key_values is a DynamicCache"):
            model()(IDS, past_key_values=transformers.DynamicCache(config=model().config, offloading=True))


@pytest.mark.parametrize("change", ["weights", "dtype"])
def test_a_saved_cache_of_other_weights_is_refused(tmp_path, change):
    cache = CompressedCache(model(), None, "streaming", **SMALL["streaming"])
    with torch.no_grad():
        model()(IDS, past_key_values=cache)
    cache.save(tmp_path)
    other = build("llama", seed=7) if change == "weights" else model().__class__(model().config).to(torch.bfloat16)
    with pytest.raises(KvcalError, match="other weights, or in another dtype"):
        CompressedCache.load(tmp_path, other)
