"""Answers to questions: greedy decoding of rows of unequal lengths through one cache.

What a row is given and what it says does not depend on the rows beside it, up to rounding: calls are padded on the
left and masked, and a row whose question is shorter begins to answer while others are still being asked. Layers with
a sliding window count padding: in a model that has some, what follows a prompt must be equally long in all rows.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...runtime.integration.support import takes_positions
from .tasks.sample import Sample
from .tasks.scoring import Scoring, settled

Ids = Sequence[int]


class RaggedCalls:
    """Calls a model with the next tokens of each row, however many each has."""

    def __init__(self, model: Any, rows: int):
        self.model = model
        self._mask = torch.ones(rows, 0, dtype=torch.int64)
        self._lengths = [0] * rows

    def copy(self) -> RaggedCalls:
        """A copy, to go on from here with another cache."""
        twin = copy.copy(self)
        twin._lengths = list(self._lengths)
        return twin

    @torch.no_grad()
    def __call__(self, cache: Any, new: Sequence[Ids], ended: Sequence[bool] | None = None) -> Tensor:
        """[B, vocabulary] logits after the last new token of each row; of a row without any they mean nothing.

        Args:
            ended: rows whose answer is complete. They stay in the batch at the position at which they ended, so that
                no row goes beyond the model's context.
        """
        ended = ended or [False] * len(new)
        width = max(map(len, new))
        ids, mask, positions = (torch.zeros(len(new), width, dtype=torch.int64) for _ in range(3))
        for row, tokens in enumerate(new):
            columns = slice(width - len(tokens), width)
            ids[row, columns], mask[row, columns] = torch.tensor(tokens, dtype=torch.int64), 1
            start = self._lengths[row] - ended[row]
            positions[row, columns] = torch.arange(start, start + len(tokens))
            self._lengths[row] = start + len(tokens)
        self._mask = torch.cat((self._mask, mask), 1)
        given = {}
        if not bool(self._mask.all()):
            given["attention_mask"] = self._mask.to(self.model.device)
        if (given or any(ended)) and takes_positions(self.model):
            given["position_ids"] = positions.to(self.model.device)
        ids = ids.to(self.model.device)
        logits: Tensor = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **given).logits
        return logits[:, -1]


@dataclass
class Answer:
    """What one row says, token by token."""

    sample: Sample
    tokenizer: Any
    scoring: Scoring
    ends: frozenset[int]
    """Token ids that end an answer."""
    most: int
    """Tokens of an answer, at most."""
    tokens: list[int] = field(default_factory=list)
    """Said so far."""
    prediction: str = ""
    score: float = 0.0
    done: bool = False

    def take(self, token: int) -> None:
        """Add one token. An answer is complete at the end of the sequence, at `most` tokens, or at a score of 1 that
        more text would leave at 1."""
        self.done = token in self.ends
        if not self.done:
            self.tokens.append(token)
            self.prediction = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        self.score = float(self.scoring(self.prediction, self.sample.answers))
        self.done |= len(self.tokens) >= self.most or settled(self.scoring, self.prediction, self.sample.answers)


def decode_answers(
    step: Callable[[Sequence[Ids], Sequence[bool]], Tensor],
    answers: Sequence[Answer],
    questions: Sequence[Ids],
    logits: Tensor | None = None,
) -> None:
    """Feed the questions token by token, and then, greedily, the answers.

    Args:
        step: one token of each row, and which rows have ended -> [B, vocabulary] logits.
        questions: token ids of each row; [] where they were asked already.
        logits: [B, vocabulary] after the questions, where they were asked already.
    """
    for at in itertools.count():
        if logits is not None:
            likeliest = logits.argmax(-1).tolist()
            for answer, question, token in zip(answers, questions, likeliest, strict=True):
                if at >= len(question) and not answer.done:
                    answer.take(token)
        ended = [answer.done for answer in answers]
        if all(ended) and at:  # one step is always taken: what it costs is measured
            return
        fed = [
            question[at : at + 1] if at < len(question) else (answer.tokens or question or answer.sample.question)[-1:]
            for answer, question in zip(answers, questions, strict=True)
        ]
        logits = step(fed, ended)


def ends_of(model: Any) -> frozenset[int]:
    """Token ids that end an answer: those at which `generate()` stops."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return frozenset([ends] if isinstance(ends, int) else ends or [])
