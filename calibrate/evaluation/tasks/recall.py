"""Questions about facts far back in real text: passkey and multikey."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from ....artifacts import KvcalError
from ...builtin.recall import fact, question, random_code
from .encoding import encode
from .sample import Sample, Task

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where in the prefix the asked fact begins, as a fraction; episodes take turns."""
_WORDS_BEFORE = 8
"""Tokens that a model may put before the digits, which alone are scored: " the", a space of its own, …"""


def make_recall_task(
    name: str,
    facts: int,
    tokenizer: Any,
    bos: list[int],
    stream: Sequence[int],
    words: Sequence[str],
    length: int,
    episodes: int,
    seed: int,
) -> Task:
    """Episodes with `facts` facts each in a prefix of exactly `length` tokens, one of them asked.

    Args:
        bos: what a prefix starts with.
        stream: the text's tokens, at least `length`; fillers are cut from it at random.
        words: at least `facts`.

    Raises:
        KvcalError: the facts do not fit.
    """
    # A generator of its own, so that a task's episodes do not depend on which others run.
    rng = random.Random(f"{seed} {name} {length}")
    made = [
        _episode(tokenizer, bos, stream, words, facts, DEPTHS[number % len(DEPTHS)], length, rng)
        for number in range(episodes)
    ]
    return Task(name, length, tuple(made), max(len(sample.reference) for sample in made) + _WORDS_BEFORE, "digits")


def _episode(
    tokenizer: Any,
    bos: list[int],
    stream: Sequence[int],
    words: Sequence[str],
    count: int,
    depth: float,
    length: int,
    rng: random.Random,
) -> Sample:
    """The asked fact begins within one other fact's length of `depth`, the others anywhere."""
    chosen = rng.sample(list(words), count)
    codes = {word: random_code(rng) for word in chosen}
    facts = {word: encode(tokenizer, fact(word, codes[word])) for word in chosen}
    asked = chosen[0]
    room = length - len(bos) - sum(map(len, facts.values()))
    if room < 1:
        raise KvcalError(
            f"a prefix of {length} tokens is too short for {count} facts, which are {length - room} tokens together: "
            "give a longer one (--prefix, or --lengths of evaluate)"
        )
    start = rng.randint(0, len(stream) - room)
    filler = list(stream[start : start + room])
    # The other facts among the filler first; then the asked one at its depth, or beside the fact that is there.
    pieces: list[list[int]] = []
    done = 0
    for cut, word in sorted((rng.randint(0, room), word) for word in chosen[1:]):
        pieces += [filler[done:cut], facts[word]]
        done = cut
    pieces.append(filler[done:])
    body = _insert(pieces, facts[asked], round(depth * length) - len(bos))
    whole = encode(tokenizer, f"{question(asked)} {codes[asked]}")
    # The answer begins with the token of its first digit: what stands before it (in some tokenizers a space of its
    # own) is asked, not scored. Words and question have no digits.
    seam = next(at for at in range(len(whole)) if re.search(r"\d", tokenizer.decode(whole[: at + 1])))
    return Sample((*bos, *body), tuple(whole[:seam]), (codes[asked],), tuple(whole[seam:]), depth)


def _insert(pieces: list[list[int]], new: list[int], target: int) -> list[int]:
    """Join filler, fact, filler, …, with `new` at position `target`, or at the nearer edge of a fact lying there."""
    body = [token for piece in pieces for token in piece]
    target = min(max(target, 0), len(body))
    start = 0
    for index, piece in enumerate(pieces):
        end = start + len(piece)
        if index % 2 and start < target < end:
            target = start if target - start <= end - target else end
        start = end
    return [*body[:target], *new, *body[target:]]
