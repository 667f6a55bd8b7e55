"""Cross-layer attention on the demo model, before and after uptraining: docs/results/cla*.

python benchmarks/cla.py                          # hours on two cores, most of it the training; goes on where it was
python benchmarks/cla.py --artifact ARTIFACT --with-questions ARTIFACT      # with what is trained already

An uptraining on stdlib, a further one on text that asks to look back, and a few `calibrate evaluate`: the commands
stand on the page.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cla_page import Part, page
from recall_text import write
from sweeps import ARTIFACT_COMMAND, COMMON, FOLDER, run

from kvcal.artifacts import load

WORK = Path(__file__).parent / "work"
"""Not in the repository: what hours of training made outlives an interruption."""
OTHER_GROUPS = "0/1-2/3"
"""Keep-ends; `--set` has commas between values."""
COMMON_TRAIN = ["--train", "all", "--lr", "2e-3", "--dtype", "bfloat16", "--checkpoint-every", "50"]
TRAINING = [
    "--data",
    "stdlib",
    "--pool",
    "mean",
    "--steps",
    "1500",
    "--batch-size",
    "8",
    "--block-size",
    "512",
    "--warmup",
    "50",
]
WITH_QUESTIONS = {
    "short.jsonl": ["--steps", "300", "--batch-size", "16", "--block-size", "256", "--warmup", "20"],
    "long.jsonl": ["--steps", "200", "--batch-size", "4", "--block-size", "2048", "--warmup", "15"],
}
"""How to go on with texts of `recall_text.py`, in this order: short rows bring copying back, long ones its reach."""
TEXTS: dict[str, dict[str, Any]] = {
    "short.jsonl": {"tokens": 3_000_000, "document_tokens": (60, 250), "seed": 0},
    "long.jsonl": {"tokens": 6_000_000, "document_tokens": (200, 2000), "seed": 1},
}
LOKI = ["--rank", ".25", "--keep", ".25", "--set", "basis=pca", "--set", "select=head"]
UNTRAINED = ["--method", "cla", "--set", "uptrained=false", "--set", "pool=mean,first"]
TRAINED = [["--method", "cla"], ["--method", "cla+loki", *LOKI]]
EVALUATIONS = [
    ["--method", "loki", *LOKI],
    UNTRAINED,
    [*UNTRAINED, "--set", f"groups={OTHER_GROUPS}"],
    *TRAINED,
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, help="uptrained on stdlib, instead of making it")
    parser.add_argument(
        "--with-questions", type=Path, help="uptrained further on recall_text.py's, instead of making it"
    )
    given = parser.parse_args()
    artifact = given.artifact or on_text()
    further = given.with_questions or on_questions(artifact)
    parts = [measured(artifact, EVALUATIONS, "cla"), measured(further, TRAINED, "cla-questions")]
    (FOLDER / "cla.md").write_text(page(parts))


def measured(artifact: Path, evaluations: Sequence[Sequence[str]], name: str) -> Part:
    """By as many evaluations as it takes, into one file, which knows what it has."""
    settings = load(artifact).stages["cla"].settings
    results = FOLDER / f"{name}.json"
    for arguments in evaluations:
        run(["evaluate", str(artifact), *COMMON, *arguments, "--output", str(results)])
    shutil.copy(artifact / "uptraining.png", FOLDER / f"{name}.png")
    rows = json.loads(results.read_text())["results"]
    return Part(name, rows, settings, commands(settings, evaluations))


def on_text() -> Path:
    """The artifact after uptraining on stdlib, or what is missing of it."""
    WORK.mkdir(exist_ok=True)
    artifact = WORK / "demo-stdlib"
    run([*ARTIFACT_COMMAND, "--output", str(artifact)])
    train(artifact, TRAINING)
    return artifact


def on_questions(start: Path) -> Path:
    """A copy of `start`, trained further."""
    WORK.mkdir(exist_ok=True)
    for number, (name, options) in enumerate(WITH_QUESTIONS.items()):
        text, artifact = WORK / name, WORK / f"demo-questions-{number}"
        if not text.exists():
            write(text, **TEXTS[name])
        if not artifact.exists():
            shutil.copytree(start, artifact)
        trained = load(artifact).stages["cla"].settings["uptraining"]
        if trained["data"]["source"]["id"] != str(text):
            train(artifact, ["--continue", "--data", str(text), *options])
        start = artifact
    return start


def train(artifact: Path, options: Sequence[str]) -> None:
    unfinished = artifact.with_name(f"{artifact.name}.uptraining").exists()
    resume = ["--resume"] if unfinished else []
    run(["share", str(artifact), "--model", "demo", "--uptrain", *options, *COMMON_TRAIN, *resume])


def commands(settings: Mapping[str, Any], evaluations: Sequence[Sequence[str]]) -> list[str]:
    """What made the page, from the settings of the training that was used and those that it went on from."""
    trainings: list[list[str]] = []
    done: Mapping[str, Any] | None = settings["uptraining"]
    while done:
        trainings.insert(0, training(done))
        done = done.get("earlier")
    evaluated = [["evaluate", "demo-stdlib", *COMMON, *arguments] for arguments in evaluations]
    parts = [[*ARTIFACT_COMMAND, "--output", "demo-stdlib"], *trainings, *evaluated]
    return [shlex.join(["calibrate", *part]) for part in parts]


def training(done: Mapping[str, Any]) -> list[str]:
    data = done["data"]
    given = {"steps": done["steps"], "lr": f"{done['lr']:g}", "train": done["train"], "distill": f"{done['distill']:g}"}
    given |= {"batch-size": done["batch_size"], "block-size": data["block_size"], "warmup": done["warmup"]}
    given |= {"seed": done["seed"], "dtype": done["dtype"]}
    start = ["--continue"] if done.get("earlier") else ["--pattern", done["groups"], "--pool", done["pool"]]
    options = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    return [
        "share",
        "demo-stdlib",
        "--model",
        "demo",
        "--uptrain",
        "--data",
        Path(data["source"]["id"]).name,
        *start,
        *options,
    ]


if __name__ == "__main__":
    main()
