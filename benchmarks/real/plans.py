"""Plans of `calibrate plan` beside uniform settings that read as much, on windows that they were neither measured nor
checked on. Bytes are those of a float32 cache."""

from __future__ import annotations

import itertools
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcal.artifacts import Artifact
from kvcal.calibrate import open_data
from kvcal.calibrate.evaluation.prompts import make_prompts
from kvcal.calibrate.evaluation.standard_errors import mean
from kvcal.calibrate.planning.allocate import Choice, choices, within
from kvcal.calibrate.planning.candidates import weighted
from kvcal.calibrate.planning.divergence import Decoder, divergences
from kvcal.calibrate.planning.kept import Kept, beside
from kvcal.calibrate.planning.points import DENSE, Point
from kvcal.calibrate.planning.prompts import PlanningRows
from kvcal.calibrate.planning.subject import Subject

from .settings import LEVELS
from .subjects import UNSEEN, Bench

BUDGETS = ("1/16", "1/8")
WINDOWS, STEPS = 12, 32
"""Of unseen text, and tokens that are decoded of each."""
Layers = list[dict[str, Any] | None]
"""The setting of each layer; None: the layer keeps the model's own cache."""


def plans(bench: Bench) -> dict[str, Any]:
    """By budget {"checked": what the plan's own check found, "rows": [plan, others]}; of each of these "what", "bytes",
    and over windows with "…_se": "divergence", of next tokens from full's in nats; "nll", by how much less likely the
    text is than with full, in nats a token; "less", by how much the plan diverges less than it."""
    artifact, path = bench.artifact(), bench.work / f"{bench.subject.model}-plan.json"
    assert artifact.folder is not None
    found: dict[str, Any] = {}
    decoder = following = None
    for budget in BUDGETS:
        plan = _made(bench, artifact.folder, path, LEVELS[budget])
        if decoder is None:
            decoder, following = _unseen(bench, artifact, plan)
        by_name = {name: (of, _decoded(decoder, of[1], following)) for name, of in compared(plan, path).items()}
        diverged = by_name["the plan"][1]["divergence"]
        rows = []
        for name, ((read, _), measured) in by_name.items():
            row: dict[str, Any] = {"what": name, "bytes": read}
            less = [other - own for other, own in zip(measured["divergence"], diverged, strict=True)]
            for key, values in {**measured, "less": less}.items():
                row[key], row[f"{key}_se"] = mean(values)
            rows.append(row)
        found[budget] = {"checked": {"full": plan["full"], "plan": plan["measured"]}, "rows": rows}
    return found


def _made(bench: Bench, folder: Path, path: Path, budget: float) -> dict[str, Any]:
    """That of `calibrate plan`. What it measures is kept beside `path`, which the next budget overwrites."""
    arguments = ["plan", str(folder), "--model", bench.subject.spec, "--dtype", "float32", "--bytes", str(budget)]
    arguments += ["--prefix", str(bench.subject.shortest), "--tasks", "perplexity,passkey", "--output", str(path)]
    for spec in UNSEEN["both"]:
        arguments += ["--data", spec]
    print("calibrate", shlex.join(arguments), flush=True)
    subprocess.run([sys.executable, "-m", "kvcal.calibrate", *arguments], check=True)
    plan: dict[str, Any] = json.loads(path.read_text())
    return plan


def _unseen(bench: Bench, artifact: Artifact, plan: dict[str, Any]) -> tuple[Decoder, Tensor]:
    """(what decodes WINDOWS windows after those of the plan; [WINDOWS, STEPS], the tokens that follow)."""
    seen = plan["windows"] + plan["check_windows"]
    windows = make_prompts(
        open_data(list(UNSEEN["both"]), seed=plan["seed"]),
        bench.loaded.tokenizer,
        prefix=plan["prefix"],
        continuation=plan["continuation"],
        windows=seen + WINDOWS,
        tasks=["perplexity"],
    ).windows
    assert windows is not None
    ids = windows.ids[seen:, : plan["prefix"] + STEPS + 1]
    decoder = Decoder(Subject(bench.loaded.model, artifact), PlanningRows(ids[:, :-1], STEPS, WINDOWS))
    return decoder, ids[:, -STEPS:]


def compared(plan: dict[str, Any], path: Path) -> dict[str, tuple[float, Layers]]:
    """By name, (bytes as the planner predicts them, settings of layers): the plan; its budget dealt by weighted and by
    plain losses; of every code the uniform setting that reads as much as the plan, interpolated. Without those that the
    plan is."""
    kept_at = beside(path)
    kept, _ = Kept.open(json.loads(kept_at.read_text())["of"], kept_at)
    points: dict[int, list[Point]] = {layer: [*of.values(), DENSE] for layer, of in kept.points.items()}
    weights = {int(layer): weight for layer, weight in plan["weights"].items()}
    budget, layers = plan["budget"]["bytes"], range(len(plan["layers"]))

    def layered(of: Mapping[int, dict[str, Any]]) -> Layers:
        return [of.get(layer) for layer in layers]

    found: dict[str, tuple[float, Layers]] = {"the plan": (plan["predicted"]["bytes"], plan["layers"])}
    for name, losses in (("weighted", weighted(points, weights)), ("unweighted", points)):
        dealt = within(choices(losses), budget)
        assert dealt is not None
        settings = {layer: point.setting for layer, point in dealt.points.items()}
        found[f"by layer, {name} losses"] = dealt.bytes, layered(settings)
    for setting in uniform(points, found["the plan"][0]):
        title = ", ".join(f"{parameter} {value}" for parameter, value in setting.items() if parameter != "method")
        found[title] = found["the plan"][0], layered(dict.fromkeys(points, setting))
    return {name: of for name, of in found.items() if name == "the plan" or of[1] != plan["layers"]}


def uniform(points: Mapping[int, Sequence[Point]], read: float) -> list[dict[str, Any]]:
    """For each code (a setting without `keep`): that code in all layers, with `keep` interpolated between neighbours of
    the grid so that it reads `read`, as bytes are linear in `keep`. Not codes whose settings all read less, or all
    more."""
    by_code: dict[str, list[tuple[float, float, dict[str, Any]]]] = {}
    for column in zip(*points.values(), strict=True):
        setting = column[0].setting
        if "keep" in setting:  # full has none
            code = json.dumps({name: value for name, value in setting.items() if name != "keep"})
            choice = Choice(dict(zip(points, column, strict=True)))
            by_code.setdefault(code, []).append((choice.bytes, setting["keep"], setting))
    found = []
    for of_code in by_code.values():
        ordered = sorted(of_code, key=lambda each: each[:2])
        for (bytes_below, keep_below, setting), (bytes_above, keep_above, _) in itertools.pairwise(ordered):
            if bytes_below <= read < bytes_above:
                share = (read - bytes_below) / (bytes_above - bytes_below)
                found.append({**setting, "keep": round(keep_below + share * (keep_above - keep_below), 5)})
    return found


@torch.no_grad()
def _decoded(decoder: Decoder, layers: Layers, following: Tensor) -> dict[str, list[float]]:
    """By window."""
    full, expected = decoder.prefilled()
    ours = decoder.decode(full, [each or {"method": "full"} for each in layers])
    nll = [-of.gather(-1, following.unsqueeze(-1)).squeeze(-1).mean(1) for of in (ours, expected)]
    return {"divergence": divergences(expected, ours).mean(1).tolist(), "nll": (nll[0] - nll[1]).tolist()}
