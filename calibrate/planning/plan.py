"""`calibrate plan`: measure, weigh the layers, deal the bytes, decode what comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ...artifacts import KvcalError
from ..evaluation.grid import FULL
from ..evaluation.prompts import Prompts
from ..evaluation.protocol import evaluate
from ..evaluation.results import Results
from .allocate import Choice, choices
from .candidates import Candidate, candidates, weighted
from .divergence import Decoder, Progress
from .points import DENSE, Point, Problem, measure, problems
from .prompts import PlanningRows
from .settings import Setting, bases, grid
from .subject import Subject
from .weights import weights


@dataclass(frozen=True)
class Offers:
    """What was measured, and all that can be made of it."""

    points: Mapping[int, Sequence[Point]]
    """Of each full-attention layer, in the order of the grid, and dense attention last."""
    weights: Mapping[int, float]
    """Of each layer's loss: how much of it reaches the model's predictions."""
    layers: int
    """Of the model."""

    @cached_property
    def choices(self) -> list[Choice]:
        """All allocations by weighted losses, by rising bytes."""
        return choices(weighted(self.points, self.weights))

    def layered(self, choice: Choice) -> list[Setting | None]:
        return [choice.points[layer].setting if layer in choice.points else None for layer in range(self.layers)]


def measure_points(
    subject: Subject, rows: PlanningRows, method: str, progress: Progress | None = None
) -> dict[int, list[Point]]:
    """Of every full-attention layer a point of each setting of `grid`, and dense attention last.

    Args:
        progress: called with (layers done, all).

    Raises:
        KvcalError: a model without full attention.
    """
    layers = subject.artifact.full_layers
    if not layers:
        raise KvcalError("no layer of this model has full attention: there is nothing to plan")
    captured: dict[int, Problem] = {}

    def measured(layer: int, settings: Sequence[Setting]) -> list[Point]:
        kept, missing = subject.kept, subject.kept.missing(layer, settings)
        if missing:
            if not captured:  # where all is kept, nothing is prefilled
                captured.update(
                    {problem.layer: problem for problem in problems(subject.model, rows.ids, rows.steps, rows.texts)}
                )
            device, batch_size = subject.model.device, subject.batch_size
            kept.add(layer, measure(captured[layer], missing, subject.artifact, device, batch_size))
            kept.write()
        return kept.of_layer(layer, settings)

    points: dict[int, list[Point]] = {}
    for done, layer in enumerate(layers):
        # The basis is chosen once per layer, all else being equal: of any basis nearly the same bytes are read.
        best = min(measured(layer.index, bases(method)), key=lambda point: point.loss, default=None)
        settings = grid(method, layer.head_dim, best.setting if best else None)
        points[layer.index] = [*measured(layer.index, settings), DENSE]
        if progress:
            progress(done + 1, len(layers))
    return points


def weigh(decoder: Decoder, points: Mapping[int, Sequence[Point]], progress: Progress | None = None) -> Offers:
    """Weights of the layers: each is decoded with a cheap setting while the others have full attention.

    Args:
        points: of `measure_points`.
        progress: called with (layers decoded, all).
    """
    layers = int(decoder.subject.model.config.get_text_config().num_hidden_layers)
    first = next(iter(points.values()))
    cheap = sorted(range(len(first)), key=lambda index: first[index].bytes)[len(first) // 4]
    alone = [[points[layer][cheap].setting if layer == other else None for other in range(layers)] for layer in points]
    by_row = dict(zip(points, decoder.by_row(alone, progress), strict=True))
    moved = dict(zip(points, decoder.divergence(alone), strict=True))
    return Offers(points, weights(moved, {layer: found[cheap].loss for layer, found in points.items()}, by_row), layers)


def for_bytes(decoder: Decoder, offers: Offers, budget: float, progress: Progress | None = None) -> list[Candidate]:
    """All candidates of at most `budget` of dense attention's bytes, decoded; the least divergent first.

    Raises:
        KvcalError: the budget is less than the cheapest settings read.
    """
    found = candidates(offers.points, offers.weights, budget)
    if not found:
        raise KvcalError(
            f"--bytes {budget:g}: the cheapest settings read {offers.choices[0].bytes:.4f} of dense attention's bytes "
            "at this length: give at least that, or a longer --prefix"
        )
    settings = [offers.layered(candidate.choice) for candidate in found]
    decoded = zip(found, decoder.divergence(settings, progress), strict=True)
    measured = (candidate.decoded(divergence) for candidate, divergence in decoded)
    return sorted(measured, key=lambda candidate: candidate.divergence)


def for_quality(offers: Offers, quality: float, check: Callable[[Choice], Mapping[str, Any]]) -> Choice:
    """The choice of fewest bytes whose measured perplexity is at most 1/quality of `full`'s, by bisection.

    Args:
        check: measures a choice, see `check_choice`.
    """
    first, last = 0, len(offers.choices) - 1  # the last one is dense everywhere
    while first < last:
        middle = (first + last) // 2
        ratio = check(offers.choices[middle])["perplexity_ratio"]
        good = ratio is not None and ratio <= 1 / quality
        first, last = (first, middle) if good else (middle + 1, last)
    return offers.choices[last]


def check_choice(subject: Subject, prompts: Prompts, offers: Offers, choice: Choice) -> dict[str, Any]:
    """The row of an evaluation of this choice, decoded through its caches; under "full" the row of full attention."""
    layered = [each or FULL for each in offers.layered(choice)]
    full, row = evaluated(subject, prompts, [FULL, {"method": layered}])
    return {**row, "full": full}


def evaluated(subject: Subject, prompts: Prompts, settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """Rows of an evaluation; what was decoded before is not decoded again.

    Args:
        settings: `full` first.
    """
    results = Results({})
    results.rows = subject.kept.checked
    found = evaluate(
        subject.model,
        subject.artifact,
        prompts,
        settings,
        tokenizer=subject.tokenizer,
        batch_size=subject.batch_size,
        results=results,
    )
    subject.kept.write()
    return found
