"""Bytes counted by hand, the observer, and caches that start from another's prefill."""

import pytest
import torch
from compressed import CLOSE, SMALL, greedy, make_cache, model, padded, random_ids, small, step_logits
from hand_counts import Shape
from methods import CASES

from kvcal.artifacts import KvcalError
from kvcal.runtime import CompressedCache
from kvcal.runtime.attention import probabilities

IDS = torch.cat((random_ids(40), random_ids(40, seed=1)))
D, FLOAT = 16, 4  # head dim, bytes
HEADS, KV_HEADS, ROWS, WINDOW = 4, 2, 2, 8


@pytest.mark.parametrize("form", [form for form in SMALL if form not in ("subgen", "clusterkv-tail", "spectral-8")])
def test_bytes_with_sliding_layers_equal_hand_counts(form):
    """Not of SubGen's clusters, nor of what lies on the host, nor of a sampled choice."""
    cache = make_cache(form, "gemma3")  # one full layer between two that slide
    step_logits(model("gemma3"), IDS, cache, 30)
    sliding = 2 * ROWS * KV_HEADS * (WINDOW - 1) * 2 * D * FLOAT
    method, shape = small(form)["method"], Shape(40, 30, D, D, KV_HEADS, HEADS // KV_HEADS, FLOAT)
    found = CASES[method].bytes(shape, **SMALL[form])
    assert cache.bytes_read() == ROWS * found.read + found.shared + sliding
    assert cache.resident_bytes() == ROWS * found.held + sliding
    assert make_cache(form, "gemma3").resident_bytes() == 0


@pytest.mark.parametrize("method", SMALL)
def test_the_observer_sees_every_step_of_every_compressed_layer(method):
    of, cache, calls = model("gemma3"), make_cache(method, "gemma3"), []

    def observe(layer, store, query, key, value, logits, output):
        calls.append((layer, store.lengths))
        assert store is cache.stores[layer]
        assert query.shape == output.shape == (2, HEADS, 1, D) and key.shape == value.shape == (2, KV_HEADS, 1, D)
        read = store.read_mask()
        assert read.shape[-1] == max(store.lengths) and read.any(-1).all()
        if method == "full":
            keys, values = (store.tokens[name].view for name in ("key", "value"))
            visible = torch.arange(keys.shape[2]) < torch.tensor(store.lengths).view(-1, 1, 1, 1)
            weights = probabilities(query, keys, logits, visible)
            torch.testing.assert_close(output, (weights @ values.unsqueeze(2)).flatten(1, 2), **CLOSE)

    cache.observer = observe
    greedy(of, padded(20, 12), new=5, past_key_values=cache)
    assert calls == [(1, [20 + step, 12 + step]) for step in range(1, 5)]
    cache.observer = None
    calls.clear()
    of(IDS[:, :1], past_key_values=cache)
    assert not calls


@pytest.mark.parametrize("method", SMALL)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_cache_that_adopts_a_prefill_equals_one_that_made_it(method, name):
    of, inputs = model(name), padded(9, 30)
    shared = CompressedCache(of, None, "full", record_mass=True, record_queries=3)
    own, heir = make_cache(method, name), make_cache(method, name)
    other = make_cache("full", name)
    new = padded(1, 1, seed=8)["input_ids"]
    position = inputs["attention_mask"].cumsum(1) - 1
    prompt = {**inputs, "position_ids": position.clamp_min(0)}
    step = {
        "input_ids": new,
        "attention_mask": torch.cat((inputs["attention_mask"], torch.ones(2, 1).long()), 1),
        "position_ids": position[:, -1:] + 1,
    }
    with torch.no_grad():
        of(**prompt, past_key_values=shared)
        of(**prompt, past_key_values=own)
        heir.adopt(shared)
        other.adopt(shared)
        of(**step, past_key_values=other)  # others that share it do not disturb
        expected = of(**step, past_key_values=own).logits
        found = of(**step, past_key_values=heir).logits
        if method == "spectral-8":  # its prompt attends to rows of 8 bits: later layers differ by that
            assert (found - expected).norm() < 0.1 * expected.norm()
        else:
            torch.testing.assert_close(found, expected, **CLOSE)
    assert heir.bytes_read() == own.bytes_read()


def test_only_a_full_cache_can_be_adopted_and_only_by_an_empty_one():
    full, loki = make_cache("full"), make_cache("loki", **SMALL["loki"])
    step_logits(model(), IDS, full, 40)
    step_logits(model(), IDS, loki, 40)
    for heir, source, message in (
        (make_cache("loki"), loki, "does not keep keys and values as they came: give one of method full"),
        (loki, full, "this cache holds tokens already: begin with an empty one"),
        (make_cache("h2o"), full, "which h2o starts from, is not known of these"),
        (make_cache("full"), make_cache("full", "qwen2"), "of another model"),
    ):
        with pytest.raises(KvcalError, match=message):
            heir.adopt(source)
    heir = make_cache("loki")
    heir.adopt(make_cache("full"))
    assert heir.get_seq_length() == 0
