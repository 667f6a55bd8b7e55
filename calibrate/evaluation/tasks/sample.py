"""What a task is made of: samples of a context, a question about it and the answers to it, as token ids."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from ....artifacts import KvcalError


@dataclass(frozen=True)
class Sample:
    """One question about one context."""

    context: tuple[int, ...]
    """Token ids of what is read before the question, from BOS on if the tokenizer adds one; never empty."""
    question: tuple[int, ...]
    """Token ids between the context and the first token of the answer; never empty."""
    answers: tuple[str, ...]
    """References; never empty."""
    reference: tuple[int, ...]
    """Token ids of the first answer as it continues the question, for teacher forcing."""
    depth: float | None = None
    """Where in the context the asked fact begins, 0 to 1; None: not stated."""
    label: str = ""
    """Which one it is, for messages, e.g. file and row; "": made by us."""


@dataclass(frozen=True)
class Task:
    """Samples that are scored alike."""

    name: str
    length: int | None
    """Tokens of the context that were asked for; None: every sample has its own (a user's prompts)."""
    samples: tuple[Sample, ...]
    new_tokens: int
    """Tokens that are decoded for an answer, at most."""
    scoring: str
    """A name in `scoring.SCORINGS`."""

    @property
    def key(self) -> str:
        """As results name it, e.g. "passkey@1024"."""
        return self.name if self.length is None else f"{self.name}@{self.length}"

    def update(self, digest: hashlib._Hash) -> None:
        """Add to `digest` all that decides what is decoded and how it is scored."""
        digest.update(json.dumps([self.name, self.length, self.new_tokens, self.scoring]).encode())
        for sample in self.samples:
            digest.update(json.dumps([sample.context, sample.question, sample.answers]).encode())


def check_fit(task: Task, most: int | None) -> None:
    """Raises KvcalError: a sample and its answer are more tokens than `most`, the model's context."""
    for number, sample in enumerate(task.samples):
        size = len(sample.context) + len(sample.question)
        if most is not None and size + task.new_tokens > most:
            raise KvcalError(
                f"{sample.label or f'{task.key}, sample {number}'}: {size} tokens and {task.new_tokens} of the answer "
                f"exceed this model's context of {most}: shorten it, or leave it out"
            )
