"""The error of attention over another layer's keys and values, against attention written out token by token."""

import math

import pytest
import torch

from kvcal.calibrate.cla import cost
from kvcal.calibrate.cla.cost import ReadingLayer

HEADS, TOKENS, DIM, VALUE_DIM = 2, 23, 5, 3
SCALING = 0.7


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    own = [torch.randn(HEADS, TOKENS, dim, generator=generator) for dim in (DIM, DIM, VALUE_DIM)]
    other = [torch.randn(HEADS, TOKENS, dim, generator=generator) for dim in (DIM, VALUE_DIM)]
    position = torch.randint(0, 9, (TOKENS,), generator=generator)  # of several blocks: positions repeat
    return own, other, position


def attend(query, key, value, position):
    """{(head, token): output} in Python."""
    outputs = {}
    for head in range(HEADS):
        for token in range(TOKENS):
            seen = [other for other in range(TOKENS) if position[other] <= position[token]]
            weights = [math.exp(SCALING * float(query[head, token] @ key[head, other])) for other in seen]
            total = sum(w * value[head, other].double() for w, other in zip(weights, seen, strict=True))
            outputs[head, token] = total / sum(weights)
    return outputs


def test_against_attention_token_by_token(tensors):
    (query, key, value), (other_key, other_value), position = tensors
    own, found = attend(query, key, value, position), attend(query, other_key, other_value, position)
    squares = sum(float((found[place] - own[place]).square().sum()) for place in own)
    expected = math.sqrt(squares / sum(float(output.square().sum()) for output in own.values()))
    layer = ReadingLayer(query, key, value, position, SCALING)
    assert layer.error(other_key, other_value) == pytest.approx(expected, rel=1e-5)


def test_the_attention_that_tokens_receive_token_by_token(tensors):
    (query, key, value), _, position = tensors
    expected = torch.zeros(TOKENS)
    for head in range(HEADS):
        for token in range(TOKENS):
            seen = [other for other in range(TOKENS) if position[other] <= position[token]]
            weights = [math.exp(SCALING * float(query[head, token] @ key[head, other])) for other in seen]
            for other, weight in zip(seen, weights, strict=True):
                expected[other] += weight / sum(weights)
    torch.testing.assert_close(ReadingLayer(query, key, value, position, SCALING).received(key), expected)


def test_its_own_keys_and_values_cost_nothing(tensors):
    (query, key, value), _, position = tensors
    assert ReadingLayer(query, key, value, position, SCALING).error(key.clone(), value.clone()) == 0


def test_values_twice_as_large_are_off_by_their_own_size(tensors):
    (query, key, value), _, position = tensors
    assert ReadingLayer(query, key, value, position, SCALING).error(key, 2 * value) == pytest.approx(1)


def test_the_future_is_not_seen(tensors):
    """What stands at the last position is seen by the queries there only."""
    (query, key, value), (other_key, other_value), position = tensors
    last = position == position.max()
    changed_key, changed_value = key.clone(), value.clone()
    changed_key[:, last], changed_value[:, last] = other_key[:, last], other_value[:, last]
    own, found = attend(query, key, value, position), attend(query, changed_key, changed_value, position)
    assert all(torch.equal(own[place], found[place]) == (not last[place[1]]) for place in own)
    layer = ReadingLayer(query, key, value, position, SCALING)
    squares = sum(float((found[place] - own[place]).square().sum()) for place in own if last[place[1]])
    norm = sum(float(output.square().sum()) for output in own.values())
    assert layer.error(changed_key, changed_value) == pytest.approx(math.sqrt(squares / norm), rel=1e-5)


@pytest.mark.parametrize("elements", [1, 100, 10**6])
def test_blocks_of_queries_change_nothing(tensors, monkeypatch, elements):
    (query, key, value), (other_key, other_value), position = tensors
    whole = ReadingLayer(query, key, value, position, SCALING).error(other_key, other_value)
    monkeypatch.setattr(cost, "_ELEMENTS", elements)
    assert ReadingLayer(query, key, value, position, SCALING).error(other_key, other_value) == pytest.approx(
        whole, rel=1e-5
    )


def test_fewer_queries_are_spread_over_the_positions(tensors):
    """Two queries: those of the first and the last token by position."""
    (query, key, value), (other_key, other_value), position = tensors
    order = position.argsort(stable=True)
    own, found = attend(query, key, value, position), attend(query, other_key, other_value, position)
    places = [(head, int(order[index])) for head in range(HEADS) for index in (0, -1)]
    squares = sum(float((found[place] - own[place]).square().sum()) for place in places)
    expected = math.sqrt(squares / sum(float(own[place].square().sum()) for place in places))
    layer = ReadingLayer(query, key, value, position, SCALING, queries=2)
    assert layer.error(other_key, other_value) == pytest.approx(expected, rel=1e-5)


def test_an_output_of_zero():
    zero = torch.zeros(1, 4, 2)
    layer = ReadingLayer(torch.randn(1, 4, 2), torch.randn(1, 4, 2), zero, torch.arange(4), 1.0)
    assert layer.error(zero, zero) == 0 and layer.error(zero, zero + 1) == 1
