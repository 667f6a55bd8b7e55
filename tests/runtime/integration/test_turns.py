"""A cache that goes on: a second turn equals one long prompt where nothing is left out, else keeps to its budget."""

import math

import pytest
import torch
from compressed import CLOSE, SMALL, artifact, close, greedy, make_cache, model, padded, random_ids, small

from kvcal.runtime import compress

pytestmark = pytest.mark.filterwarnings("ignore:kvcal. no layer")


def next_turn(tokens, mask, *lengths):
    """What was said so far and a padded second prompt: [B, T] ids and mask with padding in the middle."""
    added = padded(*lengths, seed=50)
    ids = torch.cat((tokens, added["input_ids"]), 1)
    so_far = torch.cat((mask, torch.ones(len(tokens), tokens.shape[1] - mask.shape[1]).long()), 1)
    return {"input_ids": ids, "attention_mask": torch.cat((so_far, added["attention_mask"]), 1)}


@pytest.mark.parametrize("method, settings", [("full", {}), ("loki", {"keep": 1.0, "basis": "pca", "select": "head"})])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-neox", "mistral-window"])
def test_a_second_turn_equals_one_long_prompt(method, settings, name):
    of, first = model(name), padded(9, 23, 40)
    with compress(of, artifact(name), method, **settings):
        tokens, _, cache = greedy(of, first)
        turn = next_turn(tokens, first["attention_mask"], 14, 14, 14)
        found, logits, again = greedy(of, turn, past_key_values=cache)
    assert again is cache and cache.get_seq_length() == turn["input_ids"].shape[1] + 5
    expected, expected_logits, _ = greedy(of, turn)
    assert torch.equal(found, expected)
    torch.testing.assert_close(logits, expected_logits, **CLOSE)


@pytest.mark.parametrize("method", SMALL)
def test_a_second_turn_with_padding_in_the_middle_equals_its_rows_alone(method):
    of, first = model(), padded(9, 23, 40)
    with compress(of, artifact(), **small(method)):
        tokens, _, cache = greedy(of, first)
        turn = next_turn(tokens, first["attention_mask"], 14, 3, 8)
        _, logits, _ = greedy(of, turn, past_key_values=cache)
        for row, length in enumerate((9, 23, 40)):
            start, _, alone = greedy(of, {"input_ids": first["input_ids"][row : row + 1, -length:]})
            visible = turn["attention_mask"][row].bool()
            ids = turn["input_ids"][row, visible][None]
            assert torch.equal(ids[:, : start.shape[1]], start)
            _, expected, _ = greedy(of, {"input_ids": ids}, past_key_values=alone)
            torch.testing.assert_close(logits[row : row + 1], expected, **close(method))


@pytest.mark.parametrize("method", [name for name in SMALL if "keep" in SMALL[name] and name != "snapkv"])
def test_a_second_turn_keeps_to_the_budget(method):
    """SnapKV's is of prompts."""
    of, first = model(), padded(9, 40)
    with compress(of, artifact(), **small(method)):
        tokens, _, cache = greedy(of, first)
        greedy(of, next_turn(tokens, first["attention_mask"], 14, 14), past_key_values=cache)
    page = SMALL[method].get("page", 1)
    for store in cache.stores.values():
        assert store.lengths == [9 + 6 + 14 + 5, 40 + 6 + 14 + 5]
        read = store.read_mask()
        for row, length in enumerate(store.lengths):
            budget = math.ceil(math.ceil(SMALL[method]["keep"] * length) / page) * page
            counts = read[row].sum(-1)
            if "sample" in SMALL[method]:  # which keeps to its share; of the others about as many reach the threshold
                stride, room = length // SMALL[method]["sample"], budget - 1 - SMALL[method]["recent"]
                sample = read[row, :, 1 : length - SMALL[method]["recent"]][:, stride - 1 :: stride]
                assert (sample.sum(-1) == (room + stride // 2) // stride).all()
            else:
                assert (counts <= budget).all() and (counts > budget - page).all()
            assert not read[row, :, length:].any()


@pytest.mark.parametrize("method", SMALL)
def test_chunks_by_hand_equal_one_prompt(method):
    of, inputs = model("gemma3"), padded(9, 23, 40)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    position = (mask.cumsum(1) - 1).clamp_min(0)
    whole, parts = make_cache(method, "gemma3"), make_cache(method, "gemma3")
    new = random_ids(3, seed=9).T
    last = {"attention_mask": torch.cat((mask, torch.ones(3, 1).long()), 1), "position_ids": position[:, -1:] + 1}
    found = []
    with torch.no_grad():
        of(ids, attention_mask=mask, position_ids=position, past_key_values=whole)
        for start, stop in ((0, 5), (5, 18), (18, 30), (30, 40)):  # the first holds padding only for two rows
            chunk = {"attention_mask": mask[:, :stop], "position_ids": position[:, start:stop]}
            of(ids[:, start:stop], **chunk, past_key_values=parts)
        for cache in (whole, parts):
            found.append(of(new, **last, past_key_values=cache).logits)
    torch.testing.assert_close(*found, **close(method))
