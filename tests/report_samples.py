"""An artifact with a plan, a results file and its predictions, of which a report is made; all of it may carry names
of a stranger's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from samples import artifact as sample
from samples import clusters

from kvcal.artifacts import Artifact, Stage, load, save

HEAD_DIM, TOKENS = 24, 40


def artifact(folder: Path, name: str = "tiny", **plan: Any) -> Artifact:
    """Saved in `folder` and loaded, with the stage `clusters` and a plan.

    Args:
        name: of the model and the text, and in settings and versions.
        plan: entries of plan.json in place of ours.
    """
    size = {"head_dim": HEAD_DIM, "value_dim": 5, "tokens": TOKENS}
    found = sample(**size).with_stage("clusters", clusters(**size))
    data = {**found.data, "source": {"id": name, "kind": name, "split": name}}
    settings, versions = {**found.settings, "note": name}, {**found.versions, "more": name}
    model = dataclasses.replace(found.model, id=name, fingerprint={**found.model.fingerprint, "note": name})
    stages = {key: Stage(stage.tensors, {**stage.settings}) for key, stage in found.stages.items()}
    save(
        dataclasses.replace(found, model=model, data=data, settings=settings, versions=versions, stages=stages), folder
    )
    setting = {"method": "spectral", "rank": 4, "keep": 0.125}
    body: dict[str, Any] = {
        "format": 1,
        "layers": [setting, None],
        "budget": {"bytes": 0.0625},
        "measured": {"perplexity_ratio": 1.01},
        "offers": {"0": [{"setting": setting, "bytes": 0.03, "error": 0.25, "head_errors": [0.2, 0.3]}]},
        "warnings": [],
    }
    (folder / "plan.json").write_text(json.dumps(body | plan))
    return load(folder)


ROWS: list[dict[str, Any]] = [
    {"method": "full", "perplexity_ratio": 1.0, "bytes_per_step": 1000.0, "resident_bytes": 2000.0, "score": 1.0},
    {"method": "loki", "keep": 0.25, "perplexity_ratio": 1.03, "bytes_per_step": 250.0, "resident_bytes": 2100.0},
    {"method": "loki", "keep": 0.125, "perplexity_ratio": 1.05, "bytes_per_step": 125.0, "resident_bytes": 2100.0},
    {"method": "loki", "keep": 0.5, "perplexity_ratio": 1.01, "bytes_per_step": 500.0, "resident_bytes": 2100.0},
    {"method": "h2o", "keep": 0.25, "perplexity_ratio": 40.0, "bytes_per_step": 260.0, "resident_bytes": 500.0},
]


def results(path: Path, found: Artifact | None, name: str = "asked@64", samples: int = 2, **settings: Any) -> Path:
    """A results file of `ROWS`, whose first task is called `name`, and the predictions beside it.

    Args:
        found: what it was measured with; None: another model.
        settings: in place of ours.
    """
    rows = []
    for number, row in enumerate(ROWS):
        scores = {name: 1.0 - number / 8}
        rest = {key: value for key, value in row.items() if key != "score"}
        rows.append({**rest, "perplexity_ratio_se": 0.01 * number, "scores": scores, "scores_se": {name: 0.125}})
    ours = {
        "model": name,
        "artifact": found.content_hash if found else "f" * 64,
        "weights_sha256": found.model.weights_sha256 if found else "e" * 64,
        "data": {"id": f"other {name}"},
        "prefix": 64,
    }
    path.write_text(json.dumps({"settings": ours | settings, "results": rows}))
    lines = [
        {
            "setting": {key: row[key] for key in ("method", "keep") if key in row},
            "task": name,
            "index": index,
            "question": f"question {index} of {name}",
            "prediction": f"{row['method']} says {name}",
            "answers": [f"answer to {name}"],
            "score": float(row["method"] == "full"),
            "depth": None,
        }
        for row in ROWS
        for index in range(samples)
    ]
    beside = path.with_name(path.name.removesuffix(".json") + ".predictions.jsonl")
    beside.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
