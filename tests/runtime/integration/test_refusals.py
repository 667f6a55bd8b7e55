"""What does not fit is told in one line before any token is decoded, and leaves the model as it was."""

import pytest
import torch
import transformers
from compressed import artifact, make_cache, model, padded, random_ids, traces
from transformers import DynamicCache

from kvcal.artifacts import KvcalError
from kvcal.runtime import CompressedCache, compress
from kvcal.runtime.integration import disable, enable

IDS = random_ids(12)
TINY = {"vocab_size": 96, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}

SETTINGS = {
    "unknown method": (
        {"method": "lokki"},
        r"unknown method 'lokki': did you mean loki\? there are full, spectral, loki",
    ),
    "unknown parameter": (
        {"budget": 3},
        "loki has no parameter 'budget': there are basis, .*keep, rank, .*select, .*stage, and dense_layers",
    ),
    "rank above D": ({"rank": 17}, "loki, layer 0: rank 17 is above the head dim 16: give at most 16"),
    "rank of another method": ({"method": "sparq", "rank": 17}, "sparq, layer 0: rank 17 is above the head dim 16"),
    "keep of zero": ({"keep": 0}, "loki, layer 0: keep 0: give a fraction above 0"),
    "keep below zero": ({"keep": -0.5}, "keep -0.5: give a fraction above 0"),
    "keep above one": ({"keep": 1.5}, "keep 1.5: a fraction is at most 1.0"),
    "keep that is no number": ({"keep": "all"}, "keep 'all': give a fraction such as 0.25"),
    "no such layer": ({"keep": {"0-2": 0.5, "3-": 1.0}}, "keep: layers '3-': this model has layers 0 to 2"),
    "a layer left out": ({"keep": {"1-": 0.5}}, r"keep: no value for layers \[0\]"),
    "a list too short": ({"rank": [0.5, 0.5]}, "rank: a list of 2 values for a model of 3 layers"),
    "too many dense layers": ({"dense_layers": 4}, "dense_layers 4: give a whole number from 0 to 3"),
    "unknown stage": ({"stage": "mid"}, "stage 'mid': give pre or post"),
}


@pytest.fixture
def unchanged():
    of = model()
    before = traces(of)
    yield of
    assert traces(of) == before


@pytest.mark.parametrize("case", SETTINGS)
def test_settings(case, unchanged):
    settings, message = SETTINGS[case]
    for begin in (
        lambda: enable(unchanged, artifact(), **settings),
        lambda: CompressedCache(unchanged, artifact(), **settings),
    ):
        with pytest.raises(KvcalError, match=message) as caught:
            begin()
        assert "\n" not in str(caught.value)


def test_artifacts(unchanged):
    with pytest.raises(KvcalError, match=r"fitted for model_type qwen2 .*this model has llama"):
        enable(unchanged, artifact("qwen2"))
    with pytest.raises(KvcalError, match="loki needs an artifact"):
        CompressedCache(unchanged)


def test_compress_within_compress(unchanged):
    with compress(unchanged, artifact()):
        with pytest.raises(KvcalError, match=r"already compressed: leave the other compress\(\)"):
            enable(unchanged, artifact())
        assert isinstance(unchanged(IDS).past_key_values, CompressedCache)  # the outer one goes on
    with pytest.raises(KvcalError, match="not compressed"):
        disable(unchanged)


def test_caches_that_cannot_be_taken_over(unchanged):
    with torch.no_grad():
        begun = unchanged(IDS).past_key_values
        with compress(unchanged, artifact()):
            with pytest.raises(KvcalError, match="past_key_values is a DynamicCache of 12 tokens: begin with an empty"):
                unchanged(IDS[:, :1], past_key_values=begun)
            with pytest.raises(KvcalError, match=r"StaticCache.*leave cache_implementation out"):
                unchanged.generate(IDS, max_new_tokens=2, cache_implementation="static")
            with pytest.raises(KvcalError, match="compressed cache of another model"):
                unchanged(IDS, past_key_values=make_cache("full", "qwen2"))
        cache = make_cache("loki")
        with pytest.raises(KvcalError, match="compressed cache of another model"):
            unchanged(IDS, past_key_values=make_cache("loki", "qwen2"))
        unchanged(IDS, past_key_values=cache)
        with pytest.raises(KvcalError, match="the cache holds 1 rows, got a batch of 2"):
            unchanged(padded(1, 1)["input_ids"], past_key_values=cache)
        two = padded(3, tokens := IDS.shape[1] + 1)
        with pytest.raises(KvcalError, match="the cache holds 1 rows, got a batch of 2"):
            unchanged(two["input_ids"][:, -1:], attention_mask=two["attention_mask"], past_key_values=cache)
        assert tokens == cache.get_seq_length() + 1
        unused = DynamicCache(config=unchanged.config)
        assert unchanged(IDS, past_key_values=unused).past_key_values is unused  # none of our business


def test_masks_that_hide_more_than_padding(unchanged):
    tokens = IDS.shape[1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
    banded = causal & ~causal.tril(-4)
    with torch.no_grad():
        expected = unchanged(IDS).logits
        cache = make_cache("loki")
        torch.testing.assert_close(unchanged(IDS, attention_mask=causal, past_key_values=cache).logits, expected)
        with pytest.raises(KvcalError, match="differs from a causal one with padding"):
            unchanged(IDS, attention_mask=banded, past_key_values=make_cache("loki"))
        for hidden in (
            torch.ones(1, tokens + 1).long().index_fill(1, torch.tensor([5]), 0),
            torch.ones(1, 1, 1, tokens + 1).bool().index_fill(3, torch.tensor([5]), False),
        ):
            with pytest.raises(KvcalError, match="differs from a causal one with padding"):
                unchanged(IDS[:, :1], attention_mask=hidden, past_key_values=cache)


@pytest.mark.parametrize(
    "config, settings",
    [
        ("FalconConfig", {"new_decoder_architecture": False}),
        ("GPTJConfig", {"n_embd": 32, "n_head": 2, "n_layer": 1, "rotary_dim": 8}),
        ("BloomConfig", {"n_head": 2, "n_layer": 1}),
    ],
)
def test_architectures_outside_the_attention_interface(config, settings):
    of = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**TINY, **settings)).eval()
    before = traces(of)
    for method in ("full", "h2o"):
        with pytest.raises(KvcalError, match=rf"{type(of).__name__} .*do not use transformers' attention interface"):
            enable(of, None, method)
    assert traces(of) == before


def test_encoder_decoders_and_shared_layers(unchanged):
    config = transformers.T5Config(d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, vocab_size=96)
    of = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(KvcalError, match="encoder-decoder models are not supported"):
        enable(of, None, "full")
    unchanged.config.num_kv_shared_layers = 1
    try:
        with pytest.raises(KvcalError, match="already share keys and values"):
            enable(unchanged, None, "full")
    finally:
        del unchanged.config.num_kv_shared_layers
