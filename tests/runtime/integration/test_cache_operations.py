"""What people and `generate()` do to a DynamicCache, done to ours: equal to a cache of those rows and tokens."""

import copy

import pytest
import torch
from compressed import KEEPING, SMALL, close, make_cache, model, padded, random_ids, small, step_logits, traces
from transformers import DynamicCache

from kvcal.artifacts import KvcalError

IDS = torch.cat([random_ids(30, seed=row) for row in range(3)])
NEW = torch.cat([random_ids(4, seed=10 + row) for row in range(3)])


def filled(method, rows=slice(None), tokens=30, name="llama"):
    """A cache of some rows: prefilled, then 6 decoded tokens."""
    cache = make_cache(method, name)
    step_logits(model(name), IDS[rows, :tokens], cache, 24)
    return cache


def go_on(cache, new, name="llama"):
    with torch.no_grad():
        parts = [model(name)(new[:, at : at + 1], past_key_values=cache).logits for at in range(new.shape[1])]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("method", SMALL)
def test_rows_reordered_repeated_and_selected(method):
    cases = {
        "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        "interleave": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        "indices": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
        "mask": (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
    }
    for case, (operation, rows) in cases.items():
        cache = filled(method)
        operation(cache)
        assert cache.get_seq_length() == 30, case
        torch.testing.assert_close(go_on(cache, NEW[rows]), go_on(filled(method), NEW)[rows], **close(method))


@pytest.mark.parametrize("method", KEEPING)
def test_cropped_tokens_never_came(method):
    cache = filled(method)
    cache.crop(-5)
    assert cache.get_seq_length() == 25
    torch.testing.assert_close(go_on(cache, NEW), go_on(filled(method, tokens=25), NEW), **close(method))


@pytest.mark.parametrize("method", KEEPING)
def test_a_crop_into_padding(method):
    inputs, of, logits = padded(12, 30, 30), model(), []
    for tokens, crop in ((20, 0), (30, 10)):  # the shortest row keeps 2 tokens
        cache = make_cache(method)
        mask = inputs["attention_mask"]
        with torch.no_grad():
            of(inputs["input_ids"][:, :tokens], attention_mask=mask[:, :tokens], past_key_values=cache)
            cache.crop(-crop)
            mask = torch.cat((mask[:, :20], torch.ones(3, 1).long()), 1)
            position = mask.sum(1, keepdim=True) - 1
            logits.append(of(NEW[:, :1], attention_mask=mask, position_ids=position, past_key_values=cache).logits)
        assert [store.lengths for store in cache.stores.values()] == [[3, 21, 21]] * 3
    torch.testing.assert_close(*logits, **close(method))


@pytest.mark.parametrize("method", ["streaming", "h2o"])
def test_what_was_forgotten_cannot_be_cropped_back(method):
    cache = filled(method)
    cache.crop(0)
    with pytest.raises(KvcalError, match=f"{method} cannot take back the last 5"):
        cache.crop(-5)


@pytest.mark.parametrize("method", SMALL)
def test_counts_and_offloading(method):
    cache, stock = filled(method, name="gemma3"), DynamicCache(config=model("gemma3").config)
    step_logits(model("gemma3"), IDS, stock, 24)
    assert len(cache) == len(stock) == 3
    for layer in range(3):
        assert cache.get_seq_length(layer) == stock.get_seq_length(layer) == 30
        for length in (1, 5):
            assert cache.get_mask_sizes(length, layer) == stock.get_mask_sizes(length, layer)
    assert cache.is_sliding == stock.is_sliding and cache.is_initialized
    assert "30 tokens" in repr(cache) and small(method)["method"] in repr(cache)
    expected = go_on(filled(method, name="gemma3"), NEW, "gemma3")
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    torch.testing.assert_close(go_on(cache, NEW, "gemma3"), expected, **close(method))


@pytest.mark.parametrize("method", SMALL)
def test_a_cache_that_was_reset_is_a_new_one(method):
    cache = filled(method)
    cache.reset()
    assert cache.get_seq_length() == cache.resident_bytes() == 0
    step_logits(model(), IDS[:2], cache, 24)  # another batch
    torch.testing.assert_close(go_on(cache, NEW[:2]), go_on(filled(method, slice(2)), NEW[:2]), **close(method))


@pytest.mark.parametrize("method", SMALL)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_copy_goes_on_by_itself(method, name):
    before = traces(model(name))
    expected = go_on(filled(method, name=name), NEW, name)
    original = filled(method, name=name)
    twin = copy.deepcopy(original)
    assert twin.blueprint is original.blueprint  # the artifact's tensors are shared
    if "offload" in SMALL[method]:  # what it had on the device is fetched again
        assert 0 < twin.resident_bytes() < original.resident_bytes()
    else:
        assert twin.resident_bytes() == original.resident_bytes()
    go_on(twin, NEW.flip(1), name)
    torch.testing.assert_close(go_on(original, NEW, name), expected, **close(method))
    third = copy.deepcopy(copy.deepcopy(filled(method, name=name)))
    del original, twin
    torch.testing.assert_close(go_on(third, NEW, name), expected, **close(method))  # still attached
    empty = copy.deepcopy(make_cache(method, name))
    assert empty.get_seq_length() == 0
    step_logits(model(name), IDS, empty, 24)
    del third, empty
    assert traces(model(name)) == before
