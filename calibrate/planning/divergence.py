"""How far settings move a model's predictions: KL divergence of next-token distributions, decoded token by token."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...runtime import CompressedCache
from ..evaluation.grid import FULL
from .prompts import PlanningRows, balanced
from .settings import Setting
from .subject import Subject

Progress = Callable[[int, int], None]
Layered = Sequence[Setting | None]
"""A setting for every layer of the model; None: full attention."""


class Decoder:
    """Decodes the last tokens of rows as they are given, after one dense prefill of the tokens before them."""

    def __init__(self, subject: Subject, rows: PlanningRows):
        self.subject, self.rows = subject, rows
        self._full: tuple[Any, Tensor] | None = None

    def divergence(self, settings: Sequence[Layered], progress: Progress | None = None) -> list[float]:
        """Means of `by_row`: half of text, half of questions."""
        return [balanced(torch.tensor(found), self.rows.texts) for found in self.by_row(settings, progress)]

    def by_row(self, settings: Sequence[Layered], progress: Progress | None = None) -> list[list[float]]:
        """Of each of `settings`, by row, the mean of Σ p (log p − log p′) in nats over the decoded tokens: p of `full`,
        p′ of these settings.

        Args:
            progress: called with (settings decoded, all), of those that were not decoded before.
        """
        keys = [json.dumps([each or FULL for each in layered], sort_keys=True) for layered in settings]
        kept = self.subject.kept
        todo = [key for key in dict.fromkeys(keys) if key not in kept.divergence]
        for done, key in enumerate(todo):
            full, expected = self.prefilled()
            kept.divergence[key] = divergences(expected, self.decode(full, json.loads(key))).mean(1).tolist()
            kept.write()
            if progress:
                progress(done + 1, len(todo))
        return [kept.divergence[key] for key in keys]

    @torch.no_grad()
    def prefilled(self) -> tuple[Any, Tensor]:
        """(a `full` cache of the tokens before, log-probabilities that it gives after each decoded token)"""
        if self._full is None:
            model = self.subject.model
            full, ids = CompressedCache(model, None, "full"), self.rows.ids.to(model.device)
            model(ids[:, : -self.rows.steps], past_key_values=full, use_cache=True, logits_to_keep=1)
            self._full = full, self.decode(full, "full")
        return self._full

    @torch.no_grad()
    def decode(self, full: Any, method: Any) -> Tensor:
        """[B, steps, vocabulary] log-probabilities.

        Args:
            full: of `prefilled`.
            method: as caches take it.
        """
        model, artifact = self.subject.model, self.subject.artifact
        cache = CompressedCache(model, artifact, method)
        cache.adopt(full)
        tokens = self.rows.ids[:, -self.rows.steps :].to(model.device).split(1, 1)
        calls = (model(token, past_key_values=cache, use_cache=True) for token in tokens)
        return torch.stack([call.logits[:, -1].double().log_softmax(-1).float() for call in calls], 1)


def divergences(expected: Tensor, found: Tensor) -> Tensor:
    """[…] of log-probabilities […, vocabulary]: Σ p (log p − log p′)."""
    return (expected.exp() * (expected - found)).sum(-1)
