"""Training text from which recall can be learned: stdlib with facts and questions in it, and passages that come again.

The demo model was trained on such rows (examples/demo_model/rows.py); text alone does not ask a model to look back far,
and uptraining on it does not bring back what sharing has broken. Words are those of the demo model's training.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from kvcal.calibrate.builtin.recall import dictionary, fact, question, random_code
from kvcal.calibrate.builtin.stdlib_text import documents

CHARACTERS_PER_TOKEN = 3
SHARES = {"dense": 0.2, "sparse": 0.3, "again": 0.15, "plain": 0.35}
"""Kinds of documents: many facts, all asked; one to eight facts, some asked; a passage twice; text as it is."""


def write(path: Path, *, tokens: int, document_tokens: tuple[int, int], seed: int = 0) -> None:
    """About `tokens` tokens as .jsonl, in documents of a length between the two of `document_tokens`."""
    texts = [text for _, text in documents("train")]
    words, stream = dictionary(texts)[0], "".join(texts)
    rng = random.Random(seed)
    wanted = tokens * CHARACTERS_PER_TOKEN
    with path.open("w", encoding="utf-8") as file:
        while wanted > 0:
            text = "".join(document(stream, words, rng, rng.randint(*document_tokens) * CHARACTERS_PER_TOKEN))
            wanted -= len(text)
            file.write(json.dumps({"text": text}) + "\n")


def document(stream: str, words: list[str], rng: random.Random, length: int) -> Iterator[str]:
    kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
    start = rng.randrange(len(stream) - length)
    body = stream[start : start + length]
    if kind == "plain":
        yield body
    elif kind == "again":
        passage, between = body[: length // 3], body[length // 3 : length // 3 + rng.randrange(1, length // 3)]
        yield from (passage, between, passage)
    else:
        count = max(1, length // 150) if kind == "dense" else rng.randint(1, 8)
        yield from with_facts(body[: max(40, length - 90 * count)], words, rng, count, kind == "dense")


def with_facts(body: str, words: list[str], rng: random.Random, count: int, every: bool) -> Iterator[str]:
    codes = {word: random_code(rng) for word in rng.sample(words, count)}
    asked = list(codes) if every else rng.sample(list(codes), rng.randint(1, count))
    places = {word: rng.random() for word in codes}
    events = [(place, fact(word, codes[word])) for word, place in places.items()]
    events += [
        (1.0 if rng.random() < 0.5 else rng.uniform(places[word], 1), f"{question(word)} {codes[word]}.\n")
        for word in rng.sample(asked, len(asked))
    ]
    done = 0
    for place, text in sorted(events, key=lambda event: event[0]):
        at = round(place * len(body))
        yield from (body[done:at], text)
        done = at
    yield body[done:]
