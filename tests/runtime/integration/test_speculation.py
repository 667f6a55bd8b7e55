"""Prompt-lookup and assisted decoding: the tokens of greedy decoding with the same method, guesses or not."""

import pytest
import torch
import transformers
from compressed import CLOSE, SMALL, artifact, close, greedy, make_cache, model, random_ids, small, step_logits
from transformers import DynamicCache

from kvcal.runtime import compress

LOOKUP = {"prompt_lookup_num_tokens": 3, "use_cache": True}
OLD = not hasattr(DynamicCache, "activate_past_recording")


def repeating(period=9, times=3):
    """A text in which lookup finds guesses at once."""
    return {"input_ids": random_ids(period).repeat(1, times)}


def assert_same(method, found, found_logits, tokens, logits):
    if OLD:  # where a last guess that comes true may be one token too many
        found, found_logits = found[:, : tokens.shape[1]], found_logits[:, : logits.shape[1]]
    assert torch.equal(found, tokens)
    torch.testing.assert_close(found_logits, logits, **close(method))


def calls(of):
    """The number of tokens in each of the model's forward calls, as they come."""
    counts = []
    hook = of.register_forward_pre_hook(
        lambda module, args, kwargs: counts.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return counts, hook


@pytest.mark.parametrize("method", SMALL)
@pytest.mark.parametrize(
    "inputs", [repeating(), {"input_ids": random_ids(31, seed=4)}], ids=["guesses-at-once", "guesses-later"]
)
def test_prompt_lookup_equals_greedy_decoding(method, inputs):
    of = model()
    with compress(of, artifact(), **small(method)):
        tokens, logits, _ = greedy(of, inputs, new=40)
        counts, hook = calls(of)
        found, found_logits, cache = greedy(of, inputs, new=40, **LOOKUP)
        hook.remove()
    assert len(counts) < 41 and max(counts[1:]) > 1  # it did guess, before or after the prompt's own call
    assert_same(method, found, found_logits, tokens, logits)
    # Its last token may be in the cache already, as a guess that came true.
    assert cache.get_seq_length() in (found.shape[1] - 1, found.shape[1])


@pytest.mark.parametrize("method", SMALL)
def test_prompt_lookup_with_a_given_cache_and_a_turn_after_it(method):
    of, inputs = model(), {"input_ids": random_ids(31, seed=4)}
    ours, plain = make_cache(method), make_cache(method)
    found, found_logits, _ = greedy(of, inputs, new=40, **LOOKUP, past_key_values=ours)
    tokens, logits, _ = greedy(of, inputs, new=40, past_key_values=plain)
    assert_same(method, found, found_logits, tokens, logits)
    if ours.get_seq_length() == tokens.shape[1]:  # the last token was a guess, and is in the cache
        step_logits(of, tokens[:, -1:], plain, 1)
    longer = {"input_ids": torch.cat((tokens, random_ids(9, seed=5)), 1)}
    with compress(of, artifact(), **small(method)):
        turn = greedy(of, longer, past_key_values=ours)
        expected = greedy(of, longer, past_key_values=plain)
    assert torch.equal(turn[0], expected[0])
    torch.testing.assert_close(turn[1], expected[1], **close(method))


@pytest.mark.parametrize("method", SMALL)
@pytest.mark.skipif(OLD, reason="this transformers drafts with sliding layers and crops them wrongly itself")
def test_prompt_lookup_beyond_a_sliding_window(method):
    of, inputs = model("gemma3"), repeating()
    for prompt in (inputs, {"input_ids": random_ids(31, seed=4)}):
        with compress(of, artifact("gemma3"), **small(method)):
            tokens, logits, _ = greedy(of, prompt, new=30)
            found, found_logits, _ = greedy(of, prompt, new=30, **LOOKUP)
        assert_same(method, found, found_logits, tokens, logits)


@pytest.mark.parametrize("method", SMALL)
def test_assisted_decoding_equals_greedy_decoding(method):
    of, inputs = model(), repeating()
    assistant = transformers.AutoModelForCausalLM.from_config(of.config)
    assistant.load_state_dict(of.state_dict())  # without compression: often right, not always
    assistant.generation_config.num_assistant_tokens = 4
    with torch.no_grad():
        assistant.lm_head.weight.add_(0.02 * torch.randn(assistant.lm_head.weight.shape))
    with compress(of, artifact(), **small(method)):
        tokens, logits, _ = greedy(of, inputs, new=24)
        found, found_logits, _ = greedy(of, inputs, new=24, assistant_model=assistant)
    assert_same(method, found, found_logits, tokens, logits)


def test_several_logits_of_a_prompt_do_not_make_it_guesses():
    of, ids = model(), random_ids(30)
    expected = of(ids, use_cache=False).logits[:, -8:]
    cache = make_cache("loki")
    if not OLD:
        torch.testing.assert_close(of(ids, past_key_values=cache, logits_to_keep=8).logits, expected, **CLOSE)
    cache = make_cache("loki")
    of(ids, past_key_values=cache)
    cache.crop(-20)
    torch.testing.assert_close(of(ids[:, 10:], past_key_values=cache).logits[:, -8:], expected, **CLOSE)
