"""Configs that models share, and copies of models and configs made while one is compressed."""

import copy
import gc
import io

import pytest
import torch
from architectures import build
from compressed import random_ids, traces
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from kvcal.calibrate.capture import capture
from kvcal.runtime import CompressedCache, KvcalError, compress

IDS = random_ids(24)


def twin_of(of, config):
    made = LlamaForCausalLM(config).eval()
    made.load_state_dict(of.state_dict())
    return made


def kind(of):
    with torch.no_grad():
        past = of(IDS).past_key_values
    return type(past.stores[0].policy).__name__ if isinstance(past, CompressedCache) else None


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("first_out", [0, 1])
def test_two_models_with_one_config_enter_and_leave_in_any_order(attention, first_out):
    one = build("llama", attention=attention)
    two = twin_of(one, one.config)
    expected, before = one(IDS).logits, (traces(one), traces(two))
    contexts = [compress(one, None, "streaming", keep=8), compress(two, None, "full")]
    contexts[0].__enter__()
    assert torch.equal(two(IDS).logits, expected)  # whose config names ours
    contexts[1].__enter__()
    assert (kind(one), kind(two)) == ("ByAge", "FullPolicy")
    contexts.pop(first_out).__exit__(None, None, None)
    stays, left = (one, two) if first_out else (two, one)
    assert kind(stays) is not None and kind(left) is None
    assert torch.equal(left(IDS).logits, expected)
    contexts.pop().__exit__(None, None, None)
    gc.collect()
    assert (traces(one), traces(two)) == before
    assert torch.equal(one(IDS).logits, expected) and torch.equal(two(IDS).logits, expected)


def test_a_pass_over_one_of_two_models_with_one_config_sees_that_one():
    one = build("llama")
    two, seen = twin_of(one, one.config), []
    with capture(one, lambda layer: seen.append(layer.layer)), torch.no_grad():
        two(IDS)
        assert not seen
        one(IDS)
        with pytest.raises(KvcalError, match="already being captured"), compress(two, None, "full"):
            pass
    assert seen == [0, 1, 2]


COPIES = {
    "deep copy of the config": lambda of: twin_of(of, copy.deepcopy(of.config)),
    "copy of the config": lambda of: twin_of(of, copy.copy(of.config)),
    "config from its dictionary": lambda of: twin_of(of, type(of.config).from_dict(of.config.to_dict())),
    "the config": lambda of: twin_of(of, of.config),
    "by the auto class": lambda of: AutoModelForCausalLM.from_config(of.config).eval(),
    "deep copy of the model": copy.deepcopy,
    "pickle of the model": lambda of: torch.load(saved(of), weights_only=False),
}


def saved(of):
    file = io.BytesIO()
    torch.save(of, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("name", COPIES)
def test_what_is_copied_inside_is_a_plain_model_inside_and_after(name):
    of = build("llama", attention="eager")
    expected = of(IDS).logits
    with compress(of, None, "streaming", keep=8):
        made = COPIES[name](of)
        made.load_state_dict(of.state_dict())
        assert kind(made) is None
        torch.testing.assert_close(made(IDS).logits, expected)
        assert kind(of) == "ByAge"
    del of
    torch.testing.assert_close(made(IDS).logits, expected)
    with compress(made, None, "full"):
        assert kind(made) == "FullPolicy"
    gc.collect()
    torch.testing.assert_close(made(IDS).logits, expected)
    assert made.config._attn_implementation in ("sdpa", "eager")
    assert all("kvcal" not in hook.__module__ for hook in made._forward_pre_hooks.values())  # of Python's own


def test_an_implementation_that_is_chosen_inside_stays_and_ends_compression():
    of = build("llama", attention="eager")
    expected = of(IDS).logits
    with compress(of, None, "full"):
        cache = of(IDS).past_key_values
        of.set_attn_implementation("sdpa")
        for given in ({"past_key_values": cache}, {}):
            with pytest.raises(KvcalError, match="attention implementation of this model was set to sdpa while"):
                of(IDS[:, :1], **given)
        del given
    assert of.config._attn_implementation == "sdpa"
    torch.testing.assert_close(of(IDS).logits, expected)
    with compress(of, None, "full"):  # although a cache is there still
        assert kind(of) == "FullPolicy"
        assert cache.get_seq_length() == IDS.shape[1]
    del cache
    gc.collect()
    assert of.config._attn_implementation == "sdpa"


def test_attention_weights_of_plain_calls_are_there_in_compress():
    of = build("llama", attention="eager")
    expected = of(IDS, use_cache=False, output_attentions=True).attentions
    with compress(of, None, "full"):
        found = of(IDS, use_cache=False, output_attentions=True).attentions
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
