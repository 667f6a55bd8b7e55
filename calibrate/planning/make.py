"""A plan from beginning to end: what `calibrate plan` does, for programs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...artifacts import Artifact, KvcalError
from ...artifacts.writing import write_atomically
from ...runtime.wrapped import unwrapped
from ..defaults import PLAN_BYTES
from ..evaluation.grid import FULL
from ..evaluation.prompts import Prompts
from ..evaluation.protocol import check_lengths
from ..models import max_context
from . import floor
from .allocate import Choice
from .body import Made, plan_body
from .divergence import Decoder, Progress
from .plan import check_choice, evaluated, for_bytes, for_quality, measure_points, weigh
from .prompts import QUESTIONS, answerable, split_prompts
from .settings import check_fitted, check_method
from .subject import BATCH_SIZE, Subject


@dataclass(frozen=True)
class Reporting:
    """How the steps are shown while they run; by default not at all."""

    working: Callable[[str], AbstractContextManager[Any]] = lambda title: nullcontext()
    """Entered for a step whose length is not known."""
    progress: Callable[[str], AbstractContextManager[Progress]] = lambda title: nullcontext(lambda done, total: None)
    """Entered for a step that tells (done, all)."""
    say: Callable[[str], None] = lambda line: None


def plan(
    model: Any,
    artifact: Artifact,
    prompts: Prompts,
    *,
    tokenizer: Any = None,
    method: str = "spectral",
    budget: float = PLAN_BYTES,
    quality: float | None = None,
    windows: int = 4,
    batch_size: int = BATCH_SIZE,
    output: str | os.PathLike[str] | None = None,
    reporting: Reporting | None = None,
) -> dict[str, Any]:
    """Settings for every layer: of several plans that read a share of dense attention's bytes, and of settings that are
    the same everywhere, those that move the model's predictions least when they decode.

    Args:
        prompts: of `make_prompts`, of text that the artifact was not calibrated on; windows are needed.
        tokenizer: of the model; needed where the prompts have tasks.
        method: one with a planning grid: spectral, loki, clusterkv.
        budget: share to read of what dense attention reads in the layers with full attention, per step and row.
        quality: instead: the fewest bytes that keep full's perplexity over the plan's at this or above, e.g. 0.99.
        windows: of the prompts, the first ones, to measure on; the others are for the check.
        batch_size: rows that are decoded together, and share what a step reads once.
        output: a file to write, e.g. `artifact.folder / "plan.json"`, with which `compress(model, artifact)` decodes.

    Returns:
        What the file holds: under "layers" a method and its settings for every layer, None for one that keeps the
        model's own cache; under "measured" what it lost in the check.

    Raises:
        KvcalError: no plans of this method, an artifact without what it decodes with, a budget below what its cheapest
            settings read, or prompts without windows or beyond the model's context.
    """
    model = unwrapped(model)
    reporting = reporting or Reporting()
    check_method(method)
    check_fitted(method, artifact, artifact.name)
    check_lengths(prompts, model)
    if prompts.windows is None or windows >= len(prompts.windows.ids):
        count = 0 if prompts.windows is None else len(prompts.windows.ids)
        raise KvcalError(f"{count} windows, {windows} to measure on: a plan needs more, to be checked on the others")
    prefix = prompts.windows.prefix
    batch_size = min(batch_size, len(prompts.windows.ids) - windows)
    if quality is None and artifact.full_layers:
        least = floor.floor(artifact, method, prefix, batch_size, model.dtype)
        floor.check(least, budget, prefix, batch_size, method, max_context(model.config))
    subject = Subject(model, artifact, tokenizer, batch_size)
    made = make(subject, prompts, method, windows, budget, quality, reporting)
    how = {
        "method": method,
        "budget": {"bytes": budget} if quality is None else {"quality": quality},
        "data": prompts.source,
        "model": artifact.model.id,
        "dtype": str(model.dtype).removeprefix("torch."),
        "windows": windows,
        "batch_size": batch_size,
    }
    body = plan_body(made, how)
    if output is not None:
        write_plan(Path(output), body)
    return body


def write_plan(path: Path, body: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(body, indent=1) + "\n").encode())


def make(
    subject: Subject,
    prompts: Prompts,
    method: str,
    windows: int,
    budget: float,
    quality: float | None,
    reporting: Reporting,
) -> Made:
    """Measure, weigh the layers, deal the bytes, decode what comes of it.

    Args:
        windows: how many of the prompts' windows are measured on; the others are for the check.
        quality: None: plan for the budget.
    """
    with reporting.working("asking the model itself"):
        _, checked_on = split_prompts(prompts, windows, QUESTIONS)
        (full,) = evaluated(subject, checked_on, [FULL])
    prompts, dropped = answerable(full, prompts)
    for task, score in dropped.items():
        reporting.say(f"{task}: full itself scores {score:.2f}, too little to plan by: left out")
    rows, checked_on = split_prompts(prompts, windows, QUESTIONS)
    decoder = Decoder(subject, rows)
    with reporting.progress("measuring layers") as progress:
        points = measure_points(subject, rows, method, progress)
    with reporting.progress("weighing layers") as progress:
        offers = weigh(decoder, points, progress)

    def check(choice: Choice) -> dict[str, Any]:
        with reporting.working(f"decoding with {choice.bytes:.4f} of the bytes"):
            return check_choice(subject, checked_on, offers, choice)

    if quality is not None:
        choice = for_quality(offers, quality, check)
        return Made(subject, checked_on, offers, choice, check(choice), dropped)
    with reporting.progress("decoding candidates") as progress:
        tried = for_bytes(decoder, offers, budget, progress)
    choice = tried[0].choice
    return Made(subject, checked_on, offers, choice, check(choice), dropped, tried)
