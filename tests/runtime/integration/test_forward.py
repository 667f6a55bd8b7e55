"""Plain forward calls: with caches that they make, with given ones, and with none."""

import pytest
import torch
from compressed import CLOSE, SMALL, artifact, close, make_cache, model, padded, random_ids, small, step_logits
from transformers import DynamicCache

from kvcal.artifacts import KvcalError
from kvcal.runtime import CompressedCache, compress

IDS = torch.cat((random_ids(24), random_ids(24, seed=1)))


def by_hand(of, ids, start):
    """As `step_logits`, but the cache is the one that the first call makes."""
    with torch.no_grad():
        out = of(ids[:, :start], use_cache=True)
        parts = [out.logits[:, -1:]]
        for at in range(start, ids.shape[1]):
            out = of(ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits)
    return torch.cat(parts, 1), out.past_key_values


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt-neox"])
def test_stepping_by_hand_in_compress_equals_stepping_without(name):
    of = model(name)
    expected, _ = by_hand(of, IDS, 16)
    with compress(of, artifact(name), "full"):
        found, cache = by_hand(of, IDS, 16)
    assert isinstance(cache, CompressedCache)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("method", SMALL)
def test_a_given_cache_is_the_same_in_and_outside_compress(method):
    of = model()
    with compress(of, artifact(), **small(method)):
        expected, _ = by_hand(of, IDS, 16)
        empty = step_logits(of, IDS, DynamicCache(config=of.config), 16)[:, :1]  # its first call gets ours
        inside = step_logits(of, IDS, make_cache(method), 16)
    with compress(of, artifact(), "loki", basis="pca", select="head", keep=1):
        other = step_logits(of, IDS, make_cache(method), 16)  # a given cache has the last word
    outside = step_logits(of, IDS, make_cache(method), 16)
    for found in (inside, other, outside):
        torch.testing.assert_close(found, expected, **close(method))
    torch.testing.assert_close(empty, expected[:, :1], **close(method))


def test_arguments_by_position():
    of, inputs = model(), padded(9, 24)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = make_cache("loki")
    with torch.no_grad():
        expected = of(input_ids=ids, attention_mask=mask).logits
        with compress(of, artifact(), "loki", **SMALL["loki"]):
            found = of(ids, mask)
            given = of(ids, mask, None, cache)
    assert isinstance(found.past_key_values, CompressedCache) and given.past_key_values is cache
    for row, length in enumerate((9, 24)):
        for logits in (found.logits, given.logits):
            torch.testing.assert_close(logits[row, -length:], expected[row, -length:], **CLOSE)


def test_the_backbone_called_by_itself():
    of = model()
    with torch.no_grad(), compress(of, artifact(), "exact_topk", **SMALL["exact_topk"]):
        head = by_hand(of, IDS, 23)[0][:, -1]
        out = of.model(IDS[:, :23], use_cache=True)
        assert isinstance(out.past_key_values, CompressedCache)
        last = of.model(IDS[:, 23:], past_key_values=out.past_key_values).last_hidden_state
        given = make_cache("exact_topk")
        of.model(IDS[:, :23], past_key_values=given)
        again = of.model(IDS[:, 23:], past_key_values=given).last_hidden_state
    torch.testing.assert_close(of.lm_head(last)[:, 0], head, **CLOSE)
    torch.testing.assert_close(again, last, **CLOSE)


def gradients(of, **settings):
    of.zero_grad()
    of(IDS, labels=IDS, **settings).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in of.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_gradients_are_those_of_the_model_as_it_was(name):
    of = model(name)
    expected = gradients(of, use_cache=False)
    try:
        with compress(of, artifact(name)):
            without_cache = gradients(of, use_cache=False)
            of.train()  # a training step, where no one thinks of caches
            training = gradients(of)
    finally:
        of.eval().zero_grad()
    for found in (without_cache, training):
        assert found.keys() == expected.keys()
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-6)


def test_a_cache_has_no_gradients_and_says_so_when_they_are_asked_for():
    of, cache = model(), make_cache("loki")
    of(IDS[:, :16], past_key_values=cache)  # grad mode is on
    logits = of(IDS[:, 16:17], past_key_values=cache).logits
    with pytest.raises(KvcalError, match="use_cache=False"):
        logits.sum().backward()
    of.zero_grad()
    assert all(not rows.tensor.requires_grad for store in cache.stores.values() for rows in store.tokens.values())
    torch.testing.assert_close(logits, step_logits(of, IDS[:, :17], make_cache("loki"), 16)[:, -1:], **CLOSE)
