"""Tokens of several texts, mixed: all give as many, as far as they have them, and their passages are shuffled.

A passage is a document, or a piece of a longer one. What is taken does not depend on the order in which texts are
named, but for the seed; one text is open at a time, and what was not taken is not read.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

LEAST = 8
"""Tokens that a text gives at once. Where that is more than its share, some give none."""
MOST = 4096
"""Texts that share what is asked for: more of them are opened only for what these have not got."""
_KEPT_OPEN = 16

Pieces = Iterator[tuple[list[int], bool]]
"""Token ids, and whether a document begins with them."""


@dataclass(frozen=True)
class Mixed:
    ids: list[int]
    own: list[bool]
    """False at separators."""
    counts: list[tuple[int, int]]
    """(documents, tokens) of each text in `ids`, without separators."""


def mix(
    opened: Sequence[Callable[[], Pieces]],
    wanted: int,
    longest: int,
    separator: list[int],
    seed: int,
    waves: Sequence[int] | None = None,
) -> Mixed:
    """About equally many tokens of every text, `wanted` in all (separators included) or all that there are.

    Args:
        opened: each begins its text anew.
        waves: of each text; those of a later wave are opened only for what the earlier ones have not got.
        longest: tokens of a passage.
        separator: one token or none, put between passages but after one that ends with it.
    """
    chance = random.Random(f"kvcal {seed}")
    texts = [_Text(begin) for begin in opened]
    order = list(range(len(texts)))
    chance.shuffle(order)
    for wave in sorted(set(waves or [0])):
        live = [texts[number] for number in order if waves is None or waves[number] == wave]
        # Behind every passage stands a separator, but for the last.
        while live and (need := wanted + len(separator) - sum(text.cost(separator) for text in texts)) > 0:
            share = max(need // min(len(live), MOST), LEAST)
            for text in live:
                need -= text.take(min(share, need), longest, separator)
                if len(opened) > _KEPT_OPEN:
                    text.close()
                if need <= 0:
                    break
            live = [text for text in live if not text.ended]

    passages = [(number, *passage) for number, text in enumerate(texts) for passage in text.passages]
    chance.shuffle(passages)
    _lengthen_last(passages, wanted, separator)
    ids: list[int] = []
    own: list[bool] = []
    documents: list[set[int]] = [set() for _ in texts]
    tokens = [0] * len(texts)
    for number, document, passage in passages:
        if ids and separator and ids[-1:] != separator:
            ids += separator
            own.append(False)
        passage = passage[: max(0, wanted - len(ids))]
        ids += passage
        own += [True] * len(passage)
        tokens[number] += len(passage)
        documents[number] |= {document} if passage else set()
    return Mixed(ids, own, [(len(found), count) for found, count in zip(documents, tokens, strict=True)])


def _cost(passages: Sequence[list[int]], separator: list[int]) -> int:
    """Tokens of passages, each with the separator behind it unless it ends with one."""
    return sum(len(ids) + (ids[-1:] != separator) * len(separator) for ids in passages)


def _lengthen_last(passages: list[tuple[int, int, list[int]]], wanted: int, separator: list[int]) -> None:
    """What is a token too much is cut off at the end: of a long passage, not of all that a text gave."""
    every = [ids for _, _, ids in passages]
    if every and _cost(every[:-1], separator) + len(every[-1]) > wanted:
        longest = max(range(len(passages)), key=lambda number: len(passages[number][2]))
        passages.append(passages.pop(longest))


@dataclass
class _Text:
    """How far one text has been taken."""

    begin: Callable[[], Pieces]
    passages: list[tuple[int, list[int]]] = field(default_factory=list)
    """Number of the document, token ids."""
    ended: bool = False
    _pieces: Pieces | None = None
    _pending: list[int] = field(default_factory=list)
    _begins: bool = True

    def cost(self, separator: list[int]) -> int:
        return _cost([ids for _, ids in self.passages], separator)

    def take(self, tokens: int, longest: int, separator: list[int]) -> int:
        """Add about so many to the passages, a separator for each of them included: how many were added."""
        taken = 0
        while taken < tokens and self._more():
            if self._begins or len(self.passages[-1][1]) == longest:
                last = self.passages[-1][0] if self.passages else -1
                self.passages.append((last + self._begins, []))
                taken += len(separator)
                self._begins = False
            passage = self.passages[-1][1]
            count = min(longest - len(passage), max(tokens - taken, 1))
            passage += self._pending[:count]
            taken += min(count, len(self._pending))
            self._pending = self._pending[count:]
        return taken

    def close(self) -> None:
        """Too many would be open; it is opened again, and what was taken is passed over, if it has to give more."""
        self._pieces, self._pending = None, []

    def _more(self) -> bool:
        if self._pending:
            return True
        passed = 0
        if self._pieces is None:
            self._pieces, passed = self.begin(), sum(len(ids) for _, ids in self.passages)
        for ids, begins in self._pieces:
            if passed < len(ids):
                self._pending, self._begins = ids[passed:], begins and not passed
                return True
            passed -= len(ids)
        self.ended = True
        return False
