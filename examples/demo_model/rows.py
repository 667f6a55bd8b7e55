"""What the demo model is trained on: rows of real text, recall episodes and repeated noise."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from kvcal.calibrate.builtin.recall import make_episode
from kvcal.calibrate.builtin.stdlib_text import documents

LENGTHS = (256, 512, 1024, 2048)
ROWS = ((256, 8), (512, 4), (1024, 2), (2048, 1))  # (tokens, rows) of the micro-batches of a step
SHORT_ROWS = ((128, 16), (256, 8))
LONG_ROW, LONG_EVERY = 4096, 4  # instead of the 2048 row, every fourth step


@dataclass(frozen=True)
class Phase:
    """What rows are drawn until a step."""

    until: float
    rows: tuple[tuple[int, int], ...]
    shares: tuple[float, float, float]
    """Repeated noise, dense recall, sparse recall; the rest is plain text."""


# Text first; then short rows with much to copy, which form the retrieval heads within a hundred
# steps (sparse facts alone had not within 750, and copying without text first had not within 600);
# then all lengths at once to the end.
PHASES = (
    Phase(750, ROWS, (0.0, 0.0, 0.5)),
    Phase(950, SHORT_ROWS, (0.2, 0.25, 0.2)),
    Phase(1200, ROWS, (0.1, 0.2, 0.3)),
    Phase(math.inf, ROWS, (0.03, 0.12, 0.35)),
)
ANSWER_WEIGHT = 8.0


class Rows:
    """Draws training rows: plain text, or text with facts and questions in it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, split: str, words: list[str], seed: int):
        self.rng = random.Random(seed)
        self.words = words
        self.bos = tokenizer.bos_token_id
        self.vocabulary = len(tokenizer)
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False, verbose=False)
        self.digits = [self.encode(str(digit))[0] for digit in range(10)]
        stream: list[int] = []
        for _, text in documents(split):
            stream += [*self.encode(text), tokenizer.eos_token_id]
        self.stream = stream

    def draw(self, length: int, shares: tuple[float, float, float]) -> tuple[list[int], list[float]]:
        """One row of `length` tokens and the weight of each in the loss."""
        kind = self.rng.choices(("repeat", "dense", "sparse", "plain"), (*shares, 1 - sum(shares)))[0]
        if kind == "repeat":
            return self.repeat(length)
        return self.plain(length) if kind == "plain" else self.recall(length, dense=kind == "dense")

    def plain(self, length: int) -> tuple[list[int], list[float]]:
        return [self.bos, *self._text(length - 1)], [1.0] * length

    def repeat(self, length: int) -> tuple[list[int], list[float]]:
        """Random tokens (or digits, which need longer matches) again and again; the first time costs nothing."""
        period = self.rng.randint(16, length // 2)
        alphabet = self.digits if self.rng.random() < 0.3 else range(3, self.vocabulary)
        noise = self.rng.choices(alphabet, k=period)
        ids = [self.bos, *noise * (length // period + 1)][:length]
        return ids, [0.0] * (period + 1) + [1.0] * (length - period - 1)

    def recall(self, length: int, dense: bool) -> tuple[list[int], list[float]]:
        rng = self.rng
        if dense:
            ask = num_facts = max(1, (length - 8) // rng.choice((33, 40, 60)))
        else:
            # Log-uniform: from one lonely fact to a row half full of them.
            num_facts = max(1, round(math.exp(rng.uniform(0, math.log(max(2, (length - 32) // 40))))))
            ask = rng.randint(1, min(num_facts, 12))
        text = self._text(length)
        filler = max(0, length - 1 - 13 * num_facts - 22 * ask)
        episode = make_episode(
            self.encode, text[:filler], self.words, num_facts, rng, ask=ask, questions_last=rng.random() < 0.5
        )
        ids = [self.bos, *episode.ids, *text[filler:]][:length]
        weights = [1.0] * length
        for answer in episode.answers:
            for position in answer:
                if position + 1 < length:
                    weights[position + 1] = ANSWER_WEIGHT
        return ids, weights

    def batch(self, count: int, length: int, shares: tuple[float, float, float]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, weights = zip(*[self.draw(length, shares) for _ in range(count)], strict=True)
        return torch.tensor(ids), torch.tensor(weights)

    def _text(self, length: int) -> list[int]:
        at = self.rng.randrange(len(self.stream) - length)
        return self.stream[at : at + length]
