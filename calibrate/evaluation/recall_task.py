"""Questions about facts far back in real text: one recall task at one prefix length, as token ids."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...artifacts import KvcalError
from ..builtin.recall import fact, question, random_code

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where in the prefix the asked fact begins, as a fraction; episodes take turns."""


@dataclass(frozen=True)
class RecallTask:
    """E episodes of one task at one prefix length."""

    name: str
    prefixes: Tensor
    """[E, length] int64: text with facts in it."""
    continuations: Tensor
    """[E, C] int64: question and answer, then padding up to the longest."""
    answers: tuple[range, ...]
    """Positions of each episode's answer in its continuation."""
    depths: tuple[float, ...]

    @property
    def key(self) -> str:
        """As results name it, e.g. "passkey@1024"."""
        return f"{self.name}@{self.prefixes.shape[1]}"


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
) -> RecallTask:
    """Episodes with `facts` facts each in a prefix of exactly `length` tokens, one of them asked.

    Args:
        bos: what a prefix starts with.
        stream: the text's tokens, at least `length`; fillers are cut from it at random.
        words: at least `facts`.

    Raises:
        KvcalError: the facts do not fit.
    """

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    # A generator of its own, so that a task's episodes do not depend on which others run.
    rng = random.Random(f"{seed} {name} {length}")
    made = [
        _episode(encode, bos, stream, words, facts, DEPTHS[number % len(DEPTHS)], length, rng)
        for number in range(episodes)
    ]
    longest = max(len(episode.question) + len(episode.answer) for episode in made)
    continuations = []
    for episode in made:
        ids = episode.question + episode.answer
        continuations.append(ids + ids[-1:] * (longest - len(ids)))
    return RecallTask(
        name,
        torch.tensor([episode.prefix for episode in made], dtype=torch.int64),
        torch.tensor(continuations, dtype=torch.int64),
        tuple(range(len(episode.question), len(episode.question) + len(episode.answer)) for episode in made),
        tuple(episode.depth for episode in made),
    )


@dataclass(frozen=True)
class _Episode:
    prefix: list[int]
    question: list[int]
    answer: list[int]
    depth: float


def _episode(
    encode: Callable[[str], list[int]],
    bos: list[int],
    stream: Sequence[int],
    words: Sequence[str],
    count: int,
    depth: float,
    length: int,
    rng: random.Random,
) -> _Episode:
    """The asked fact begins within one other fact's length of `depth`, the others anywhere."""
    chosen = rng.sample(list(words), count)
    codes = {word: random_code(rng) for word in chosen}
    facts = {word: encode(fact(word, codes[word])) for word in chosen}
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
    ids = encode(question(asked))
    whole = encode(f"{question(asked)} {codes[asked]}")
    # Some tokenizers merge across the seam: the answer is what follows the last token that both share.
    shared = next((i for i, (a, b) in enumerate(zip(ids, whole, strict=False)) if a != b), min(len(ids), len(whole)))
    return _Episode([*bos, *body], whole[:shared], whole[shared:], depth)


def _insert(pieces: list[list[int]], new: list[int], target: int) -> list[int]:
    """Join filler, fact, filler, …, with `new` at position `target`, or at the nearer edge of the fact there."""
    body = [token for piece in pieces for token in piece]
    target = min(max(target, 0), len(body))
    start = 0
    for index, piece in enumerate(pieces):
        end = start + len(piece)
        if index % 2 and start < target < end:
            target = start if target - start <= end - target else end
        start = end
    return [*body[:target], *new, *body[target:]]
