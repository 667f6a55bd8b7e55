"""Bytes counted by hand, the observer, and caches that start from another's prefill."""

import math

import pytest
import torch
from compressed import CLOSE, SMALL, greedy, make_cache, model, padded, random_ids, step_logits

from kvcal.artifacts import KvcalError
from kvcal.runtime import METHODS, CompressedCache
from kvcal.runtime.attention import probabilities

IDS = torch.cat((random_ids(40), random_ids(40, seed=1)))
D, FLOAT, CHUNK = 16, 4, 256  # head dim, bytes, the tokens by which buffers grow
HEADS, KV_HEADS, ROWS, WINDOW = 4, 2, 2, 8
CLUSTERS = 7 + 1 + 1  # of 4 tokens: 28 of the prompt's 30 and twice 4 of the 10 decoded ones
CODEWORDS, PAGE = 8, 64


def read_by_hand(method, tokens):
    """Bytes that one layer reads at a step with a budget of a quarter, of keys and values at D floats a token."""
    budget = math.ceil(0.25 * tokens)
    key_heads, vector = ROWS * KV_HEADS, D * FLOAT
    chosen = ROWS * HEADS * budget * 2 * vector  # each query head its own keys and values
    return {
        "full": key_heads * tokens * 2 * vector,
        # the first half of each rotated key, the chosen, one rotation per KV head
        "loki": key_heads * tokens * vector // 2 + chosen + KV_HEADS * D * D * FLOAT,
        # every key, then values only
        "exact_topk": key_heads * tokens * vector + chosen // 2,
        # two corners per page of 4 tokens, whole pages
        "quest": key_heads * math.ceil(tokens / 4) * 2 * vector + ROWS * HEADS * math.ceil(budget / 4) * 4 * 2 * vector,
        # half of the channels, by query head; the mean value
        "sparq": ROWS * HEADS * tokens * vector // 2 + chosen + key_heads * vector,
        # what is held, with an int32 position; h2o with a float of attention too
        "streaming": key_heads * budget * (2 * vector + 4),
        "h2o": key_heads * budget * (2 * vector + 4 + 4),
        # every centroid with its int32 size, then a budget of 0.3, which the heads of a group share, and where it lies
        "clusterkv": key_heads * (CLUSTERS * (vector + 4) + math.ceil(0.3 * tokens) * (2 * vector + 4)),
        # the same budget; of each token codeword, code of 4 bits and scale; codewords, their lengths and maps in
        # 16 bits. No page is full, whose correction would be read.
        "spectral": key_heads * (tokens * (1 + D // 2 + 2) + math.ceil(0.3 * tokens) * 2 * vector)
        + KV_HEADS * 2 * (CODEWORDS * (2 * D + 1) + 2 * D * D),
    }[method]


@pytest.mark.parametrize("method", [name for name in METHODS if name != "subgen"])  # counted in test_subgen
def test_bytes_with_sliding_layers_equal_hand_counts(method):
    cache = make_cache(method, "gemma3")  # one full layer between two that slide
    step_logits(model("gemma3"), IDS, cache, 30)
    sliding = 2 * ROWS * KV_HEADS * (WINDOW - 1) * 2 * D * FLOAT
    assert cache.bytes_read() == read_by_hand(method, 40) + sliding
    per_token = 2 * D * FLOAT + {"streaming": 4, "h2o": 8, "clusterkv": 4, "spectral": 1 + D // 2 + 2}.get(method, 0)
    corners, means = CHUNK // 4 * 2 * D * FLOAT, CHUNK // 4 * (2 * D * FLOAT + 4)
    corrections = CHUNK // PAGE * (D + 2)  # of a page: 8 bits a dimension, and a scale
    extra = {"quest": corners, "sparq": D * FLOAT, "clusterkv": means, "spectral": corrections}.get(method, 0)
    capacity = 16 if method in ("streaming", "h2o") else CHUNK  # a quarter of 40 tokens, in slots by 16
    assert cache.resident_bytes() == ROWS * KV_HEADS * (capacity * per_token + extra) + sliding
    assert make_cache(method, "gemma3").resident_bytes() == 0


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
            keys, values = (store.rows[name].view for name in ("key", "value"))
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
    shared = CompressedCache(of, None, "full", record_mass=True)
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
        (make_cache("loki"), loki, "an empty cache can take over a cache of method full"),
        (loki, full, "an empty cache can take over"),
        (make_cache("h2o"), full, "recorded attention: prefill with full, record_mass=True"),
        (make_cache("full"), make_cache("full", "qwen2"), "of another model"),
    ):
        with pytest.raises(KvcalError, match=message):
            heir.adopt(source)
    heir = make_cache("loki")
    heir.adopt(make_cache("full"))
    assert heir.get_seq_length() == 0
