"""Rotary embeddings that depend on the number of tokens: what generate(use_cache=False) gives, or a refusal first."""

import copy
import pickle

import pytest
import torch
from architectures import build
from compressed import padded, random_ids, small, traces
from transformers import DynamicCache

from kvcal.calibrate.capture import capture
from kvcal.calibrate.evaluation.grid import FULL
from kvcal.calibrate.evaluation.prompts import Prompts, Windows
from kvcal.calibrate.evaluation.protocol import evaluate
from kvcal.runtime import CompressedCache, KvcalError, compress, decode

ORIGINAL = 32
OLD = not hasattr(DynamicCache, "activate_past_recording")
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [4.0 + pair for pair in range(8)]}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
MODELS = {
    "phi3": ("phi3", {"rope_parameters": {**LONG, **FACTORS}, "original_max_position_embeddings": ORIGINAL}),
    "longrope": ("llama", {"rope_parameters": {**LONG, **FACTORS}}),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": ORIGINAL}),
    "by kind of layer": (
        "gemma3",
        {
            "rope_parameters": {
                "full_attention": DYNAMIC,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "max_position_embeddings": ORIGINAL,
        },
    ),
}
CHANGES = rf"rotary embedding \(.*\) changes beyond {ORIGINAL} tokens"


def make(name):
    """Its attention is sharp, or the rotation would not matter to the tokens."""
    architecture, settings = MODELS[name]
    of = build(architecture, **settings)
    of.generation_config.eos_token_id = of.config.vocab_size
    with torch.no_grad():
        for key, parameter in of.named_parameters():
            if any(part in key for part in ("qkv_proj", "q_proj", "k_proj")):
                parameter.mul_(8)
    return of


@pytest.fixture(scope="module", params=MODELS)
def of(request):
    return make(request.param)


def plain(of, inputs, new, **settings):
    return of.generate(**inputs, max_new_tokens=new, do_sample=False, use_cache=False, **settings)


def roads(of, inputs, new):
    """Every way to decode greedily."""

    def in_compress(**settings):
        with compress(of, None, "full"):
            return of.generate(**inputs, max_new_tokens=new, do_sample=False, **settings)

    def in_steps():
        cache, mask = CompressedCache(of, None, "full"), inputs["attention_mask"]
        ids = inputs["input_ids"]
        for _ in range(new):
            with torch.no_grad():
                fed = ids[:, cache.get_seq_length() :]
                positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -fed.shape[1] :]
                out = of(fed, attention_mask=mask, position_ids=positions, past_key_values=cache)
            ids = torch.cat((ids, out.logits[:, -1:].argmax(-1)), 1)
            mask = torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
        return ids

    return {
        "compress": in_compress,
        "chunks": lambda: in_compress(prefill_chunk_size=7),
        "lookup": lambda: in_compress(prompt_lookup_num_tokens=3),
        "a cache": lambda: of.generate(
            **inputs, max_new_tokens=new, do_sample=False, past_key_values=CompressedCache(of, None, "full")
        ),
        "decode": lambda: decode(of, method="full", max_new_tokens=new, **inputs).tokens,
        "steps": in_steps,
    }


def test_within_the_original_length_every_road_gives_what_no_cache_gives(of):
    for inputs in (padded(20), padded(20, 9)):
        new = ORIGINAL + 1 - 20  # the last token is not fed
        expected = plain(of, inputs, new)
        for road, tokens in roads(of, inputs, new).items():
            if road != "lookup":
                assert torch.equal(tokens(), expected), road
        old_windows = OLD and of.config.model_type == "gemma3_text"  # which it cannot crop
        if len(expected) == 1 and not old_windows:  # lookup takes one row, and may guess beyond the end
            assert torch.equal(roads(of, inputs, new - 3)["lookup"](), expected[:, :-3])


@pytest.mark.parametrize("inputs", [padded(24), {k: torch.nn.functional.pad(v, (2, 0)) for k, v in padded(24).items()}])
def test_beyond_it_they_refuse_before_the_model_is_called(of, inputs):
    before, calls = traces(of), []
    expected = plain(of, inputs, 12)
    hook = of.register_forward_hook(lambda *args: calls.append(1))
    for road, tokens in roads(of, inputs, 12).items():
        calls.clear()
        drops = of.config.model_type == "phi3" and not OLD and bool(inputs["attention_mask"].all())
        if road == "compress" and drops:  # which computes all keys anew there
            assert torch.equal(tokens(), expected)
            continue
        with pytest.raises(KvcalError, match=CHANGES):
            tokens()
        assert len(calls) == (ORIGINAL - 23 if road == "steps" else 0), road  # nothing tells of steps to come
    hook.remove()
    del tokens
    assert traces(of) == before


@pytest.mark.parametrize("name", ["phi3", "longrope"])
def test_a_prompt_beyond_the_original_length_is_long_from_the_start(name):
    of, inputs = make(name), padded(40)
    expected = plain(of, inputs, 8)
    for road, tokens in roads(of, inputs, 8).items():
        message = CHANGES if road == "chunks" else None  # the first of which is short
        if (name, road) == ("phi3", "a cache"):
            message = "leaves out a cache that it is given for a prompt of 40"
        if message is None:
            assert torch.equal(tokens(), expected), road
        else:
            with pytest.raises(KvcalError, match=message):
                tokens()
    cache = CompressedCache(of, None, "full")
    of(inputs["input_ids"], past_key_values=cache)
    for again in (cache, copy.deepcopy(cache)):
        again.crop(-20)
        with pytest.raises(KvcalError, match=CHANGES):  # the keys of a long text, in a short one
            of(random_ids(1), past_key_values=again)


def test_a_saved_cache_knows_the_length_of_its_keys(tmp_path):
    of = make("longrope")
    cache = CompressedCache(of, None, "full")
    of(random_ids(40), past_key_values=cache)
    cache.save(tmp_path)
    loaded = CompressedCache.load(tmp_path, of)
    assert torch.equal(*(of(random_ids(1), past_key_values=each).logits for each in (cache, loaded)))
    cache.crop(-20)
    with pytest.raises(KvcalError, match=CHANGES):
        cache.save(tmp_path)


@pytest.mark.skipif(OLD, reason="this transformers never lets go of a stretched embedding, whatever reads it")
def test_a_dynamic_embedding_that_another_text_has_stretched():
    """At exactly its original length it stays as that text left it."""
    of, ids = make("dynamic"), random_ids(ORIGINAL)
    cache = CompressedCache(of, None, "full")
    of(ids[:, :-1], past_key_values=cache)
    of(random_ids(60), use_cache=False)
    with pytest.raises(KvcalError, match=CHANGES):
        of(ids[:, -1:], past_key_values=cache)


def test_evaluation_refuses_before_it_decodes():
    of, calls = make("longrope"), []
    of.register_forward_hook(lambda *args: calls.append(1))
    with pytest.raises(KvcalError, match=CHANGES):
        evaluate(of, None, Prompts(Windows(random_ids(48), 24), ()), [FULL])
    assert not calls


@pytest.mark.parametrize("name", ["longrope", "dynamic"])
@pytest.mark.parametrize("tokens", [20, 40])
def test_a_pass_sees_keys_before_the_rotation_of_its_length(name, tokens):
    of, projected, seen = make(name), {}, {}
    for layer, block in enumerate(of.model.layers):
        keep = lambda module, args, output, layer=layer: projected.update({layer: output})  # noqa: E731
        block.self_attn.k_proj.register_forward_hook(keep)
    of(random_ids(60), use_cache=False)  # a dynamic embedding stays as this leaves it, until a short text comes
    with torch.no_grad(), capture(of, lambda layer: seen.update({layer.layer: layer.key_pre})) as pre_rotary:
        for seed in range(2):  # by replay, then by rotating back
            of(random_ids(tokens, seed=seed), use_cache=False)
            for layer, key in seen.items():
                expected = projected[layer].unflatten(-1, (-1, key.shape[-1])).transpose(1, 2)
                torch.testing.assert_close(key, expected, rtol=1e-4, atol=1e-4)
    assert set(pre_rotary.methods.values()) == {"unrotate"}


def test_copies_inside_have_the_method_of_their_class():
    of = make("phi3")
    with compress(of, None, **small("streaming")):
        twins = [copy.deepcopy(of), pickle.loads(pickle.dumps(of))]
    for twin in twins:
        assert torch.equal(plain(twin, padded(9), 3), plain(of, padded(9), 3))
        assert torch.equal(twin.generate(**padded(9), max_new_tokens=3, do_sample=False), plain(of, padded(9), 3))
