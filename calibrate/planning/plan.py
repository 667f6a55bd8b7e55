"""`calibrate plan`: measure, deal the bytes, check by decoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...artifacts import Artifact, KvcalError
from ...runtime.planned import FORMAT
from ..evaluation.prompts import Prompts
from ..evaluation.protocol import evaluate
from ..evaluation.results import Results
from .allocate import Choice, choices, hull, within
from .points import DENSE, Point, Problem, Setting, measure, problems
from .prompts import PlanningRows
from .settings import bases, grid

Progress = Callable[[int, int], None]
BATCH_SIZE = 8
MOST_PERPLEXITY, LEAST_SCORE = 1.1, 0.9
"""Over `full`'s; beyond them a plan is warned of."""


@dataclass(frozen=True)
class Offers:
    """What was measured, and all that can be made of it."""

    points: Mapping[int, Sequence[Point]]
    """Of each full-attention layer."""
    choices: Sequence[Choice]
    """By rising bytes."""
    layers: int
    """Of the model."""

    def layered(self, choice: Choice) -> list[Setting | None]:
        return [choice.points[layer].setting if layer in choice.points else None for layer in range(self.layers)]


def measure_offers(
    model: Any,
    artifact: Artifact,
    rows: PlanningRows,
    method: str,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
) -> Offers:
    """Measure every setting of `grid` in every full-attention layer.

    Args:
        batch_size: rows that will be decoded together, and share the maps of a basis.

    Raises:
        KvcalError: a method without a grid, a model without full attention.
    """
    found = problems(model, rows.ids, rows.steps, rows.texts)
    if not found:
        raise KvcalError("no layer of this model has full attention: there is nothing to plan")
    done, total = 0, sum(_count(problem, method) for problem in found)

    def step() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    def points_of(problem: Problem) -> list[Point]:
        head_dim = problem.key.shape[3]

        def try_(settings: Sequence[Setting]) -> list[Point]:
            return measure(problem, settings, artifact, model.device, batch_size, step)

        tried = try_(bases(method, head_dim))
        # The basis is chosen once per layer, all else being equal: it costs the same bytes whichever it is.
        best = min(tried, key=lambda point: point.loss).setting if tried else {}
        basis: Setting = {name: best[name] for name in ("stage", "basis") if name in best}
        return [*try_(grid(method, head_dim, basis)), DENSE]

    points = {problem.layer: points_of(problem) for problem in found}
    layers = int(model.config.get_text_config().num_hidden_layers)
    return Offers(points, choices(points), layers)


def _count(problem: Problem, method: str) -> int:
    head_dim = problem.key.shape[3]
    return len(bases(method, head_dim)) + len(grid(method, head_dim, {}))


def for_bytes(offers: Offers, budget: float) -> Choice:
    """The choice that spends at most `budget` of dense attention's bytes.

    Raises:
        KvcalError: less than the cheapest settings read.
    """
    found = within(offers.choices, budget)
    if found is None:
        raise KvcalError(
            f"--bytes {budget:g}: the cheapest settings read {offers.choices[0].bytes:.4f} of dense attention's bytes "
            "at this length: give at least that, or a longer --prefix"
        )
    return found


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


def check_choice(
    model: Any,
    artifact: Artifact,
    prompts: Prompts,
    offers: Offers,
    choice: Choice,
    results: Results,
    batch_size: int = BATCH_SIZE,
    tokenizer: Any = None,
) -> dict[str, Any]:
    """The row of an evaluation of these settings, decoded for real; under "full" that of full attention.

    Args:
        results: of earlier checks on these prompts, which are not decoded again.
    """
    setting = {"method": [entry or {"method": "full"} for entry in offers.layered(choice)]}
    full, row = evaluate(
        model, artifact, prompts, [setting], tokenizer=tokenizer, batch_size=batch_size, results=results
    )
    return {**row, "full": full}


def ruinous(checked: Mapping[str, Any]) -> list[str]:
    """What a check says against a plan, in a line each. Args: checked: of `check_choice`."""
    found = []
    ratio = checked["perplexity_ratio"]
    if ratio is None or ratio > MOST_PERPLEXITY:
        found.append("perplexity is beyond measure" if ratio is None else f"perplexity is {ratio:.2f} of full's")
    for task, value in checked["relative"].items():
        if value is not None and value < LEAST_SCORE:
            found.append(f"{task} is answered {value:.2f} as well as by full")
    return found


def plan_body(
    offers: Offers,
    choice: Choice,
    how: Mapping[str, Any],
    checked: Mapping[str, Any],
    dropped: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """What plan.json holds. Args: dropped: see `answerable`."""
    full = checked["full"]
    return {
        "format": FORMAT,
        "layers": offers.layered(choice),
        **how,
        "predicted": {"bytes": choice.bytes, "attention_error": choice.error},
        "measured": {
            "bytes": checked["bytes_per_step"] / full["bytes_per_step"],
            "attention_error": _mean(checked["attention_error"]),
            **{name: checked[name] for name in ("perplexity_ratio", "perplexity_ratio_se")},
            **{name: checked[name] for name in ("scores", "relative", "relative_se")},
        },
        "full": {"perplexity": full["perplexity"], "scores": full["scores"]},
        "dropped": dict(dropped or {}),
        "warnings": ruinous(checked),
        "offers": {
            str(layer): [
                {"setting": point.setting, "bytes": point.bytes, "error": point.error, "head_errors": point.head_errors}
                for point in hull(points)
            ]
            for layer, points in offers.points.items()
        },
    }


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known)
