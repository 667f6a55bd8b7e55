"""Key-value recall episodes: facts scattered in real text, asked for later.

    ... real text ... The code of WORD is 48213. ... real text ...
    What is the code of WORD? The code of WORD is 48213.

The demo model is trained on them, and retrieval tasks are made of them. Half of the
dictionary is kept for evaluation, so that no fact asked for there was trained on.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

CODE_DIGITS = 5


def fact(word: str, code: str) -> str:
    return f"\nThe code of {word} is {code}.\n"


def question(word: str) -> str:
    """The text that `code` answers: greedy decoding continues it with the digits."""
    return f"\nWhat is the code of {word}? The code of {word} is"


def dictionary(texts: Iterable[str], size: int = 2000) -> tuple[list[str], list[str]]:
    """The most frequent plain words of `texts`: (training words, evaluation words), disjoint."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(re.findall(r"(?<![\w.])[a-z]{4,9}(?![\w(.=])", text))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))[:size]
    return ranked[0::2], ranked[1::2]


def random_code(rng: random.Random) -> str:
    return f"{rng.randrange(10**CODE_DIGITS):0{CODE_DIGITS}d}"


@dataclass(frozen=True)
class Episode:
    """Token ids of one row and where its answers stand."""

    ids: list[int]
    answers: list[range]
    """Positions of each answer's tokens in `ids`."""
    asked_facts: list[int]
    """For each answer, the position at which its fact begins."""


def make_episode(
    encode: Callable[[str], list[int]],
    filler: Sequence[int],
    words: Sequence[str],
    num_facts: int,
    rng: random.Random,
    *,
    ask: int = 1,
    questions_last: bool = True,
) -> Episode:
    """Scatter `num_facts` facts in `filler` and ask for `ask` of them.

    Args:
        encode: text -> token ids, without special tokens.
        filler: the row's real text as token ids; every token of it is used.
        questions_last: put all questions at the end; otherwise anywhere after their facts.
    """
    chosen = rng.sample(list(words), num_facts)
    codes = {word: random_code(rng) for word in chosen}
    asked = rng.sample(chosen, min(ask, num_facts))
    cuts = {word: rng.randint(0, len(filler)) for word in chosen}
    events: list[tuple[int, int, str]] = [(cuts[word], 0, word) for word in chosen]
    for word in asked:
        at = len(filler) if questions_last else rng.randint(cuts[word], len(filler))
        events.append((at, 1, word))
    # Facts before questions at the same cut; the rest of the tie is broken by chance.
    rng.shuffle(events)
    events.sort(key=lambda event: event[:2])

    ids: list[int] = []
    answers: list[range] = []
    fact_at: dict[str, int] = {}
    asked_facts: list[int] = []
    done = 0
    for cut, is_question, word in events:
        ids.extend(filler[done:cut])
        done = cut
        if is_question:
            ids.extend(encode(question(word)))
            answer = encode(f" {codes[word]}")
            answers.append(range(len(ids), len(ids) + len(answer)))
            asked_facts.append(fact_at[word])
            ids.extend(answer)
            ids.extend(encode(".\n"))
        else:
            fact_at[word] = len(ids)
            ids.extend(encode(fact(word, codes[word])))
    ids.extend(filler[done:])
    return Episode(ids, answers, asked_facts)
