"""Tokens of several texts, mixed: all give as many, as far as they have them, and their passages are shuffled.

A passage is a document, or a piece of a longer one. Beyond a few texts only one is open at a time, and none is read
much further than its tokens are taken.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

LEAST = 8
"""Tokens that a text gives at once, at least. Where that is more than its share, some texts give none."""
MOST = 4096
"""Texts that share what is asked of a source: further ones are opened only for what these lack."""
_KEPT_OPEN = 16

Pieces = Iterator[tuple[list[int], bool]]
"""Token ids, and whether a document begins with them."""


@dataclass(frozen=True)
class Mixed:
    ids: list[int]
    from_text: list[bool]
    """False at separators."""
    counts: list[tuple[int, int]]
    """(documents, tokens) of each text in `ids`, without separators."""


def mix(texts: Sequence[Text], wanted: int, longest: int, separator: list[int], seed: int) -> Mixed:
    """`wanted` tokens, separators included, or all that there are.

    Sources give about equally many, and so do the texts of a source.

    Args:
        texts: none of them taken from yet.
        longest: tokens of a passage, at most.
        separator: one token or none, put between passages but after one that ends with it.
        seed: of the order of the passages, and of which texts are read where there are too many.
    """
    chance = random.Random(f"kvcal {seed}")
    order = list(texts)
    chance.shuffle(order)
    sources: dict[int, list[Text]] = {}
    for text in order:
        sources.setdefault(text.source, []).append(text)
    # Behind every passage stands a separator, but for the last.
    while (need := wanted + len(separator) - sum(text.cost(separator) for text in texts)) > 0:
        live = [ready for ready in map(_first_wave, sources.values()) if ready]
        if not live:
            break
        of_source = max(need // len(live), 1)
        for ready in live:
            lacking = min(of_source, need)
            share = max(lacking // min(len(ready), MOST), LEAST)
            for text in ready:
                if lacking <= 0:
                    break
                taken = text.take(min(share, lacking), longest, separator)
                lacking, need = lacking - taken, need - taken
                if len(ready) > _KEPT_OPEN:
                    text.close()

    passages = [(number, *passage) for number, text in enumerate(texts) for passage in text.passages]
    chance.shuffle(passages)
    _lengthen_last(passages, wanted, separator)
    ids: list[int] = []
    from_text: list[bool] = []
    documents: list[set[int]] = [set() for _ in texts]
    tokens = [0] * len(texts)
    for number, document, passage in passages:
        if ids and separator and ids[-1:] != separator:
            ids += separator
            from_text.append(False)
        passage = passage[: max(0, wanted - len(ids))]
        ids += passage
        from_text += [True] * len(passage)
        tokens[number] += len(passage)
        documents[number] |= {document} if passage else set()
    return Mixed(ids, from_text, [(len(found), count) for found, count in zip(documents, tokens, strict=True)])


def _cost(passages: Sequence[list[int]], separator: list[int]) -> int:
    """Tokens of passages, each with the separator behind it unless it ends with one."""
    return sum(len(ids) + (ids[-1:] != separator) * len(separator) for ids in passages)


def _lengthen_last(passages: list[tuple[int, int, list[int]]], wanted: int, separator: list[int]) -> None:
    """Put a long passage last, where tokens too many are cut off: a short one may be all that its text gave."""
    every = [ids for _, _, ids in passages]
    if every and _cost(every[:-1], separator) + len(every[-1]) > wanted:
        longest = max(range(len(passages)), key=lambda number: len(passages[number][2]))
        passages.append(passages.pop(longest))


def _first_wave(texts: Sequence[Text]) -> list[Text]:
    """The texts of a source that have not ended and whose wave it is; the one that has given least comes first."""
    live = [text for text in texts if not text.ended]
    first = min((text.wave for text in live), default=0)
    return sorted((text for text in live if text.wave == first), key=Text.given)


@dataclass
class Text:
    """A text, and how far it has been taken."""

    begin: Callable[[], Pieces]
    """Opens it, anew each time."""
    source: int = 0
    wave: int = 0
    """It is read only if the texts of smaller waves of its source have not got enough."""
    passages: list[tuple[int, list[int]]] = field(default_factory=list)
    """Number of the document, token ids."""
    ended: bool = False
    _pieces: Pieces | None = None
    _pending: list[int] = field(default_factory=list)
    _begins: bool = True

    def cost(self, separator: list[int]) -> int:
        return _cost([ids for _, ids in self.passages], separator)

    def given(self) -> int:
        return sum(len(ids) for _, ids in self.passages)

    def take(self, tokens: int, longest: int, separator: list[int]) -> int:
        """Add about so many tokens to the passages, a separator for each passage included; returns the number added."""
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
        """Close it, as too many would be open; to give more it is opened again, and what it gave is passed over."""
        self._pieces, self._pending = None, []

    def _more(self) -> bool:
        if self._pending:
            return True
        passed = 0
        if self._pieces is None:
            self._pieces, passed = self.begin(), self.given()
        for ids, begins in self._pieces:
            if passed < len(ids):
                self._pending, self._begins = ids[passed:], begins and not passed
                return True
            passed -= len(ids)
        self.ended = True
        return False
