"""Plans beside the uniform settings that read as much, on windows that they were neither measured nor checked on.

python benchmarks/plan.py MODEL ARTIFACT PLAN.json… --data TEXT… --output FILE.json

The plans are of one length and text, for several budgets. Decoded are, for each, the plan, its budget dealt by
weighted and by plain losses, and every uniform setting of the grid that reads from 0.85 of the budget to all
of it; all from one prefill. A line of each: settings and bytes; by how much next tokens diverge from full's (nats), by
how much they are less likely (nats, the logarithm of the ratio of perplexities), how often the likeliest is full's; the
plan's first two less these. Standard errors over windows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from kvcal.calibrate import load_model, open_data
from kvcal.calibrate.evaluation.prompts import make_prompts
from kvcal.calibrate.evaluation.standard_errors import mean
from kvcal.calibrate.planning.allocate import Choice, choices, within
from kvcal.calibrate.planning.candidates import weighted
from kvcal.calibrate.planning.divergence import Decoder, divergences
from kvcal.calibrate.planning.kept import Kept, beside
from kvcal.calibrate.planning.points import DENSE, Point
from kvcal.calibrate.planning.prompts import PlanningRows
from kvcal.calibrate.planning.subject import Subject
from kvcal.runtime import load

Layered = list[dict[str, Any] | None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("plans", type=Path, nargs="+")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--steps", type=int, default=32, help="tokens decoded of each window")
    parser.add_argument("--output", type=Path, required=True, help="keeps what was decoded, and goes on with it")
    given = parser.parse_args()
    plans = {path: json.loads(path.read_text()) for path in given.plans}
    one = next(iter(plans.values()))
    loaded = load_model(given.model, device="cpu", dtype=one["dtype"])
    seen = one["windows"] + one["check_windows"]
    prompts = make_prompts(
        open_data(given.data, seed=one["seed"]),
        loaded.tokenizer,
        prefix=one["prefix"],
        continuation=one["continuation"],
        windows=seen + given.windows,
        tasks=["perplexity"],
    )
    assert prompts.windows is not None
    ids = prompts.windows.ids[seen:, : one["prefix"] + given.steps + 1]
    subject = Subject(loaded.model, load(given.artifact))
    decoder = Decoder(subject, PlanningRows(ids[:, :-1], given.steps, given.windows))
    found = json.loads(given.output.read_text()) if given.output.exists() else {}
    for path, plan in plans.items():
        named = compared(plan, path)
        for layered in named.values():
            if (key := json.dumps(layered)) not in found:
                found[key] = decoded(decoder, layered, ids[:, -given.steps :])
                given.output.write_text(json.dumps(found, indent=1))
        print(f"\n{path}: budget {plan['budget']['bytes']:g}, {given.windows} windows, {given.steps} tokens decoded")
        rows = {name: found[json.dumps(layered)] for name, layered in named.items()}
        for name, row in rows.items():
            print(line(name, row, rows["plan"]), flush=True)


def compared(plan: dict[str, Any], path: Path) -> dict[str, Layered]:
    """By name, with what they read in it: the plan first."""
    kept_at = beside(path)
    kept, _ = Kept.open(json.loads(kept_at.read_text())["of"], kept_at)
    points: dict[int, list[Point]] = {layer: [*of.values(), DENSE] for layer, of in kept.points.items()}
    weights = {int(layer): weight for layer, weight in plan["weights"].items()}
    budget, layers = plan["budget"]["bytes"], range(len(plan["layers"]))

    def layered(choice: Choice) -> Layered:
        return [choice.points[layer].setting if layer in choice.points else None for layer in layers]

    found: dict[str, Layered] = {"plan": plan["layers"]}
    for name, losses in (("weighted", weighted(points, weights)), ("unweighted", points)):
        dealt = within(choices(losses), budget)
        assert dealt is not None
        found[f"by layer, {name} {dealt.bytes:.4f}"] = layered(dealt)
    for column in zip(*points.values(), strict=True):
        choice = Choice(dict(zip(points, column, strict=True)))
        if 0.85 * budget <= choice.bytes <= budget:
            setting = {name: value for name, value in column[0].setting.items() if name != "method"}
            found[f"{setting} {choice.bytes:.4f}"] = layered(choice)
    return found


@torch.no_grad()
def decoded(decoder: Decoder, layered: Layered, following: torch.Tensor) -> dict[str, list[float]]:
    """By window. Args: following: [N, steps], the tokens after those that are decoded."""
    full, expected = decoder.prefilled()
    ours = decoder.decode(full, [each or {"method": "full"} for each in layered])
    nll = [-of.gather(-1, following.unsqueeze(-1)).squeeze(-1).mean(1) for of in (ours, expected)]
    same = (ours.argmax(-1) == expected.argmax(-1)).double().mean(1)
    return {
        "divergence": divergences(expected, ours).mean(1).tolist(),
        "nll_over_full": (nll[0] - nll[1]).tolist(),
        "same_token": same.tolist(),
    }


def line(name: str, row: dict[str, list[float]], plan: dict[str, list[float]]) -> str:
    shown = [f"{key} {_estimate(row[key])}" for key in row]
    if row is not plan:
        less = {key: [a - b for a, b in zip(plan[key], row[key], strict=True)] for key in row}
        shown += [f"plan less this: {key} {_estimate(less[key])}" for key in ("divergence", "nll_over_full")]
    return f"{name}: " + "; ".join(shown)


def _estimate(values: list[float]) -> str:
    value, error = mean(values)
    return f"{value:.5f} ± {error:.5f}"


if __name__ == "__main__":
    main()
