"""`spectral` beside every other method at equal bytes, its plans and its ablation, on the demo model.

python benchmarks/spectral.py            # about twenty minutes on two quiet cores; interrupted runs go on
python benchmarks/spectral.py --page     # only the page, from what was measured

Writes docs/results/spectral.json, .md and .png. All in bfloat16, so that a number of the cache has two bytes as where
caches are large.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from demo import demo_artifact
from spectral_page import write_page

from kvcal.artifacts import KvcalError
from kvcal.calibrate import load_model, open_data
from kvcal.calibrate.evaluation.prompts import make_prompts
from kvcal.calibrate.evaluation.protocol import evaluate
from kvcal.calibrate.evaluation.results import Results
from kvcal.calibrate.planning.divergence import Decoder
from kvcal.calibrate.planning.plan import for_bytes, measure_points, weigh
from kvcal.calibrate.planning.prompts import QUESTIONS, PlanningRows, split_prompts
from kvcal.calibrate.planning.subject import Subject

FOLDER = Path(__file__).parent.parent / "docs" / "results"
LEVELS = {"1/32": 1 / 32, "1/16": 1 / 16, "1/12": 1 / 12, "1/8": 1 / 8, "1/4": 1 / 4}
WINDOWS, CONTINUATION, EPISODES, MEASURED = 8, 128, 16, 4
GROUP = {"select": "group"}
LOKI = {"method": "loki", "basis": "pca", **GROUP}
CLUSTERS = {"sinks": 4, "window": 64}

OTHERS: list[dict[str, Any]] = [
    *({"method": "streaming", "keep": keep} for keep in (1 / 32, 1 / 16, 1 / 8, 1 / 4)),
    *({"method": "h2o", "keep": keep} for keep in (1 / 32, 1 / 16, 1 / 8, 1 / 4)),
    *({**LOKI, "rank": rank, "keep": keep} for rank, keep in ((4, 0.025), (8, 0.015), (8, 0.05), (16, 0.1))),
    *(
        {"method": "clusterkv", "keep": keep, "tokens_per_cluster": tokens, **CLUSTERS}
        for tokens, keep in ((80, 0.02), (80, 0.05), (16, 0.03), (16, 0.05), (16, 0.09), (16, 0.21))
    ),
    *(
        {"method": "clusterkv", "keep": keep, "tokens_per_cluster": 16, "tail": True, **CLUSTERS}
        for keep in (0.06, 0.18)
    ),
    *(
        {"method": "quest", "keep": keep, "page": page, **GROUP}
        for page, keep in ((64, 0.0156), (32, 0.03), (16, 0.0156), (16, 0.0625), (16, 0.18))
    ),
    *(
        {"method": "sparq", "rank": rank, "keep": keep, **GROUP}
        for rank, keep in ((2, 0.015), (4, 0.03), (8, 0.06), (16, 0.12))
    ),
    *(
        {"method": "subgen", "window": window, "clusters": clusters, "t": 2, "s": samples, "normaliser": "values"}
        for window, clusters, samples in ((16, 2, 8), (40, 4, 12), (90, 8, 24), (200, 16, 40))
    ),
]
MIDDLE = {"method": "spectral", "rank": 32, "bits": 2, "rows": 8, "keep": 0.03125}
UNIFORM: list[dict[str, Any]] = [
    {**MIDDLE, "rank": 16, "keep": 0.0078125},
    {**MIDDLE, "rank": 16, "keep": 0.04},
    {**MIDDLE, "keep": 0.0078125},
    {**MIDDLE, "keep": 0.045},
    {**MIDDLE, "keep": 0.12},
    {**MIDDLE, "bits": 4, "keep": 0.06},
    {**MIDDLE, "rank": 64, "keep": 0.3},
    {**MIDDLE, "rank": 64, "bits": 4, "keep": 0.18},
]
ABLATION: dict[str, dict[str, Any]] = {
    "as it is": MIDDLE,
    "half the dimensions": {**MIDDLE, "rank": 16},
    "twice the dimensions": {**MIDDLE, "rank": 64},
    "4 bits": {**MIDDLE, "bits": 4},
    "half the dimensions, 4 bits": {**MIDDLE, "rank": 16, "bits": 4},
    "rows of 16 bits": {**MIDDLE, "rows": 16},
    "rows of 16 bits, half as many": {**MIDDLE, "rows": 16, "keep": 0.015625},
    "no residual": {**MIDDLE, "residual": False},
    "choice by a threshold from 128 scores": {**MIDDLE, "sample": 128},
    "choice by the largest logit of a group": {**MIDDLE, "select": "max"},
    "choice by every query head": {**MIDDLE, "select": "head"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="only write the page again")
    if not parser.parse_args().page:
        measure()
    write_page(FOLDER, LEVELS, ABLATION, [*UNIFORM, *ABLATION.values(), *OTHERS])


def measure() -> None:
    artifact = demo_artifact(load_model("demo", device="cpu", dtype="float32"))
    loaded = load_model("demo", device="cpu", dtype="bfloat16")
    heldout = open_data("stdlib", "heldout")
    prompts = make_prompts(
        heldout,
        loaded.tokenizer,
        continuation=CONTINUATION,
        windows=MEASURED + WINDOWS,
        episodes=QUESTIONS + EPISODES,
        name="heldout",
    )
    measured, checked = split_prompts(prompts, MEASURED, QUESTIONS)
    path = FOLDER / "spectral.json"
    settings = {"model": "demo", "dtype": "bfloat16", "tokens_sha256": checked.tokens_sha256, "plans": {}}
    if path.exists():
        settings["plans"] = json.loads(path.read_text())["settings"]["plans"]
    if not settings["plans"]:
        settings["plans"] = plans_of(Subject(loaded.model, artifact, loaded.tokenizer), measured)
    plans = [{"method": plan["layers"]} for plan in settings["plans"].values()]
    results = Results.open(settings, path)
    grid = [*plans, *UNIFORM, *ABLATION.values(), *OTHERS]
    evaluate(
        loaded.model,
        artifact,
        checked,
        grid,
        tokenizer=loaded.tokenizer,
        results=results,
        progress=progress("decoding"),
    )


def plans_of(subject: Subject, rows: PlanningRows) -> dict[str, Any]:
    """By the names of `LEVELS` that reach."""
    decoder = Decoder(subject, rows)
    offers = weigh(decoder, measure_points(subject, rows, "spectral", progress("measuring")))
    found = {}
    for name, budget in LEVELS.items():
        try:
            best = for_bytes(decoder, offers, budget)[0]
        except KvcalError as error:  # the cheapest settings read more
            print(f"{name}: {error}", flush=True)
            continue
        predicted = {"bytes": best.choice.bytes, "attention_error": best.choice.error, "divergence": best.divergence}
        found[name] = {"layers": offers.layered(best.choice), "kind": best.kind, "predicted": predicted}
    return found


def progress(what: str) -> Any:
    def show(done: int, total: int, left: str = "") -> None:
        if done % 1000 == 0 or done == total:
            print(f"{what}: {done} of {total}", flush=True)

    return show


if __name__ == "__main__":
    main()
