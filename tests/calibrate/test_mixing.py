"""Tokens are numbered by text, document and position, so that what was made of them can be told from the result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import pytest

from kvcal.calibrate.mixing import LEAST, Mixed, Text, mix

EOS = 7
SIZES = [[50, 3], [1], [400, 400, 400], [90] * 20, [1000], [5] * 30]
"""Tokens of the documents of each text."""


def _token(text: int, document: int, position: int) -> int:
    return 1_000_000_000 + text * 1_000_000 + document * 10_000 + position


class _Texts:
    """Texts that know how many of them are open, and how much of them was read."""

    def __init__(self, sizes: Sequence[Sequence[int]], piece: int = 40):
        self.sizes, self.piece = sizes, piece
        self.open = self.most_open = self.read = 0
        self.begun: set[int] = set()

    def opened(self, sources: Sequence[int] | None = None) -> list[Text]:
        of = sources or [0] * len(self.sizes)
        return [Text(partial(self._pieces, text), source=of[text]) for text in range(len(self.sizes))]

    def _pieces(self, text: int) -> Iterator[tuple[list[int], bool]]:
        self.open += 1
        self.most_open = max(self.open, self.most_open)
        self.begun.add(text)
        try:
            for document, size in enumerate(self.sizes[text]):
                for start in range(0, size, self.piece):
                    ids = [_token(text, document, at) for at in range(start, min(start + self.piece, size))]
                    self.read += len(ids)
                    yield ids, start == 0
        finally:
            self.open -= 1


def _passages(found: Mixed) -> list[list[int]]:
    passages: list[list[int]] = [[]]
    for token, own in zip(found.ids, found.from_text, strict=True):
        assert own == (token != EOS)
        if own:
            passages[-1].append(token)
        else:
            passages.append([])
    return passages


@pytest.mark.parametrize("wanted", [5, 100, 700, 2500, 10**6])
@pytest.mark.parametrize("longest", [16, 10**6])
def test_passages_are_the_beginnings_of_the_texts(wanted: int, longest: int) -> None:
    found = mix(_Texts(SIZES).opened(), wanted, longest, [EOS], 0)
    passages = _passages(found)
    everything = sum(map(sum, SIZES))
    assert len(found.ids) == wanted or (wanted > everything and len(found.ids) == everything + len(passages) - 1)
    taken: set[int] = set()
    for passage in passages:
        assert 0 < len(passage) <= longest
        assert passage == list(range(passage[0], passage[0] + len(passage))), "of one document, in its order"
        assert not taken & set(passage)
        taken |= set(passage)
    for text, sizes in enumerate(SIZES):
        mine = [_token(text, document, at) for document, size in enumerate(sizes) for at in range(size)]
        count = found.counts[text][1]
        there = [token in taken for token in mine]
        # The last passage of all may have been cut off by a token.
        assert sum(there) == count and sum(there[: count + 1]) >= count - 1
        documents = {(token - 1_000_000_000) // 10_000 for token, is_there in zip(mine, there, strict=True) if is_there}
        assert found.counts[text][0] == len(documents)


@pytest.mark.parametrize("wanted", [300, 700, 1500, 2500])
def test_all_texts_give_as_much_as_far_as_they_have_it(wanted: int) -> None:
    """Max-min fair: who gave less than another had no more."""
    counts = [tokens for _, tokens in mix(_Texts(SIZES).opened(), wanted, 10**6, [], 0).counts]
    assert sum(counts) == wanted
    for sizes, count in zip(SIZES, counts, strict=True):
        assert count == sum(sizes) or count >= max(counts) - LEAST


@pytest.mark.parametrize("few", [10**6, 150], ids=["long", "short"])
def test_sources_give_as_much_however_many_texts_they_have(few: int) -> None:
    sizes = [[1000]] * 30 + [[few]] + [[1000]] * 2
    counts = [tokens for _, tokens in mix(_Texts(sizes).opened([0] * 30 + [1, 2, 2]), 900, 10**6, [], 0).counts]
    by_source = [sum(counts[:30]), counts[30], sum(counts[31:])]
    assert by_source == pytest.approx([300, 300, 300] if few > 300 else [375, 150, 375], abs=LEAST)
    assert max(counts[:30]) - min(counts[:30]) <= LEAST and abs(counts[31] - counts[32]) <= LEAST


def test_the_order_is_drawn_from_the_seed_alone() -> None:
    everything = sum(map(sum, SIZES))
    all_of_it = mix(_Texts(SIZES).opened(), 10**6, 16, [EOS], 3)
    total = len(all_of_it.ids)
    assert mix(_Texts(SIZES, piece=7).opened(), total, 16, [EOS], 3) == all_of_it, "nor from what is asked for"
    other = mix(_Texts(SIZES).opened(), 10**6, 16, [EOS], 4)
    assert other.ids != all_of_it.ids and other.counts == all_of_it.counts
    assert sorted(map(tuple, _passages(other))) == sorted(map(tuple, _passages(all_of_it)))
    firsts = {(token - 1_000_000_000) // 1_000_000 for token in all_of_it.ids[: everything // 4] if token != EOS}
    assert firsts == set(range(len(SIZES))) - {1}, "passages of all texts are among the first ones, but of the tiny one"


def test_thousands_of_texts_are_drawn_and_one_is_open_at_a_time() -> None:
    texts = _Texts([[1000]] * 2000)
    found = mix(texts.opened(), 640, 100, [EOS], 0)
    given = {number for number, (_, tokens) in enumerate(found.counts) if tokens}
    assert len(given) == -(-641 // (LEAST)) and texts.begun == given
    assert texts.most_open == 1 and texts.open == 0
    assert texts.read <= 640 + 40 * len(given), "no more than a piece of each beyond what is needed"
    again = mix(texts.opened(), 640, 100, [EOS], 1)
    assert given != {number for number, (_, tokens) in enumerate(again.counts) if tokens}


def test_a_text_that_is_opened_again_goes_on_where_it_was() -> None:
    sizes = [[3]] * 19 + [[500, 500]]
    texts = _Texts(sizes)
    found = mix(texts.opened(), 10**6, 10**6, [], 0)
    expected = [_token(text, 0, at) for text in range(19) for at in range(3)]
    expected += [_token(19, document, at) for document in range(2) for at in range(500)]
    assert sorted(found.ids) == expected
    assert texts.most_open == 1


def test_no_second_separator_behind_a_passage_that_ends_with_it() -> None:
    def chats(first: int) -> Iterator[tuple[list[int], bool]]:
        for number in range(10):
            yield [first + number, EOS], True

    found = mix([Text(partial(chats, 100)), Text(partial(chats, 200))], 32, 100, [EOS], 0)
    assert len(found.ids) == 32 and found.ids[1::2] == [EOS] * 16
    assert found.from_text.count(False) <= 2, "behind a chat of each that was cut off"
    assert all(tokens >= 12 for _, tokens in found.counts)
