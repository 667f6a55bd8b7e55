"""What sharing keys and values between layers costs: before any training, by pattern and by where a training starts;
and what training from the fitted start gives back."""

from __future__ import annotations

import itertools
from typing import Any

from kvcal.artifacts import Artifact

from .decoding import decode, text_and_passkey, text_of, whole
from .subjects import TEXTS, Bench

PATTERNS = ("keep-ends", "uniform", "auto", "dense-front", "dense-back")
"""In groups of two, or storing as many layers as those."""
FITTED: dict[str, Any] = {"method": "cla"}
"""Shared projections in closed form, which are in the artifact."""
MEAN: dict[str, Any] = {"method": "cla", "uptrained": False, "pool": "mean"}
"""Of the layers' projections: what the paper starts from."""

TRAINED = "keep-ends"
"""The pattern that is trained: of those that halve the cache, the one that loses least before."""
BLOCK, BATCH = 512, 2
LINKS = (0, 50, 150)
"""Steps of trainings of which each goes on from the one before, with a schedule of its own: at the end of each, rates
have fallen to 0, and the model is measured."""
TRAINING = ["--train", "attention", "--lr", "3e-4", "--batch-size", str(BATCH), "--block-size", str(BLOCK)]
"""The loss is the divergence from the original's predictions alone: of the text, which is of the same books as what is
evaluated, nothing is learned that the original does not know, so that no other control is needed."""


def sharing(bench: Bench, only: str | None = None) -> None:
    """Perplexity and passkey of the paper's patterns and of auto's map, not trained. From the mean, where one pattern
    shows that nothing is answered, perplexity alone of the others."""
    fitted = {pattern: _fitted(bench, pattern) for pattern in PATTERNS}
    asked, text = text_and_passkey(bench), text_of(bench)
    for pattern, artifact in fitted.items():
        starts = [FITTED, MEAN] if pattern == TRAINED else [FITTED]
        decode(bench, f"sharing-{pattern}", asked, starts, artifact, full_of=whole(bench))
    others = [pattern for pattern in PATTERNS if pattern != TRAINED]
    for pattern in others:
        decode(bench, f"mean-{pattern}", text, [MEAN], fitted[pattern], full_of=f"mean-{others[0]}")


def uptraining(bench: Bench, only: str | None = None) -> None:
    """The same of one pattern, by tokens trained on; the start, of shorter blocks than in `sharing`, is not decoded."""
    trained: list[Artifact] = []
    steps = list(itertools.accumulate(LINKS))
    for seed, (link, done) in enumerate(zip(LINKS, steps, strict=True)):
        trained.append(_trained(bench, done, link, seed, trained[-1] if trained else None))
    prompts = text_and_passkey(bench)
    for done, artifact in zip(steps[1:], trained[1:], strict=True):
        part = f"uptraining-{done * BATCH * BLOCK}"
        decode(bench, part, prompts, [FITTED], artifact, full_of=whole(bench))


def _fitted(bench: Bench, pattern: str) -> Artifact:
    """The artifact of short blocks with a map, and projections that were fitted for it to the calibration text."""
    share = _share(bench, "--pattern", pattern)
    return bench.changed(pattern, [share, [*share, "--uptrain", "--steps", "0", *_text()]])


def _trained(bench: Bench, steps: int, link: int, seed: int, before: Artifact | None) -> Artifact:
    """`before` after a link of the chain; None: the fitted start."""
    share = _share(bench, *([] if before else ["--pattern", TRAINED]))
    start = ["--continue", "--seed", str(seed)] if before else []
    train = [*share, "--uptrain", "--resume", *start, "--steps", str(link), *TRAINING, *_text()]
    return bench.changed(f"trained-{steps}", [train] if before else [share, train], before)


def _share(bench: Bench, *options: str) -> list[str]:
    return ["share", "--model", bench.subject.spec, *options]


def _text() -> list[str]:
    return [part for spec in TEXTS["both"] for part in ("--data", spec)]
