"""What is forgotten before several tokens come at once is what a single one would have pushed out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvcal.runtime.attention import SoftmaxSpec
from kvcal.runtime.kv.saved import Saved
from kvcal.runtime.methods import METHODS
from kvcal.runtime.settings import new_store
from kvcal.runtime.store import Store

HKV, G, D, TOKENS, COMING = 2, 2, 8, (24, 17), 5
SPEC = SoftmaxSpec(0.3)
EVICTING: list[dict[str, Any]] = [
    {"method": "streaming", "keep": 9, "sinks": 2},
    {"method": "h2o", "keep": 9},
    {"method": "h2o", "keep": 0.4},
    {"method": "streaming", "keep": 1},
    {"method": "snapkv", "keep": 9, "window": 3},
    {"method": "subgen", "window": 6, "sinks": 2, "clusters": 3, "t": 2, "s": 4, "normaliser": "clusters"},
]


def drawn(heads: int, tokens: int, seed: int) -> Tensor:
    return torch.randn(len(TOKENS), heads, tokens, D, generator=torch.Generator().manual_seed(seed))


def prefilled(setting: dict[str, Any]) -> Store:
    """Two rows, the second padded on the left."""
    method = METHODS[setting["method"]](**{name: value for name, value in setting.items() if name != "method"})
    store = new_store(method.bind(0, D, None))
    valid = torch.arange(TOKENS[0]) >= TOKENS[0] - torch.tensor(TOKENS).unsqueeze(1)
    store.prefill(drawn(HKV * G, TOKENS[0], 0), drawn(HKV, TOKENS[0], 1), drawn(HKV, TOKENS[0], 2), SPEC, valid)
    return store


def step(store: Store) -> Tensor:
    store.append(drawn(HKV, 1, 3), drawn(HKV, 1, 4))
    return store.attend(drawn(HKV * G, 1, 5), SPEC)


@pytest.mark.parametrize("setting", EVICTING, ids=str)
def test_a_step_after_it_is_the_step_that_it_would_have_been(setting):
    plain, room = prefilled(setting), prefilled(setting)
    room.make_room()
    held = next(iter(room.tokens.values())).used
    assert held < TOKENS[1]  # it has forgotten, in both rows
    room.make_room()  # twice is once
    assert torch.equal(step(plain), step(room))
    first, second = plain.state(), room.state()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_several_tokens_then_see_what_is_held_and_one_another():
    """`streaming`: two sinks and the six most recent of nine, and of the coming ones those up to their own."""
    store = prefilled(EVICTING[0])
    store.make_room()
    query, key, value = (drawn(heads, COMING, seed) for heads, seed in ((HKV * G, 3), (HKV, 4), (HKV, 5)))
    out = store.prefill(query, key, value, SPEC)
    for row, tokens in enumerate(TOKENS):
        padding = TOKENS[0] - tokens
        kept = [padding + at for at in (0, 1, *range(tokens - 6, tokens))]
        for head in range(HKV * G):
            keys, values = (
                torch.cat((drawn(HKV, TOKENS[0], seed)[row, head // G, kept], new[row, head // G])).double()
                for seed, new in ((1, key), (2, value))
            )
            for at in range(COMING):
                seen = slice(len(kept) + at + 1)
                weights = (keys[seen] @ query[row, head, at].double() * SPEC.scaling).softmax(0)
                torch.testing.assert_close(out[row, head, at].double(), weights @ values[seen], rtol=1e-4, atol=1e-5)


def test_methods_that_keep_all_keep_all():
    for name, method in METHODS.items():
        assert method.keeps_all_tokens == (name not in ("streaming", "h2o", "snapkv", "subgen"))
    store = prefilled({"method": "quest"})
    store.make_room()
    assert store.tokens["key"].used == TOKENS[0]


@pytest.mark.parametrize("setting", EVICTING, ids=str)
def test_it_can_be_saved_after_it(setting):
    room = prefilled(setting)
    room.make_room()
    state = {name: tensor.clone() for name, tensor in room.state().items()}
    room.check(Saved(state))
    again = prefilled(setting)
    again.restore(state)
    torch.testing.assert_close(step(room), step(again))  # slots lie in another order


def test_a_prompt_that_was_chosen_from_observes_nothing_more():
    room = prefilled({"method": "snapkv", "keep": 9, "window": 3})
    assert room.observed is not None
    room.make_room()
    assert room.observed is None
