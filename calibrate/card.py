"""The card of an artifact: what it is, where it comes from, what to expect of it."""

from __future__ import annotations

import json
import re

from ..artifacts import Artifact
from .plots import rank_figure
from .rank import rank_report

PLACE = "THIS FOLDER OR ITS HUB ID"
"""What the card's example loads, until it is known where the artifact lies on the Hub."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def card_files(artifact: Artifact, variance: float = 0.9) -> dict[str, bytes]:
    """README.md and rank.png, for `artifacts.save(..., extras=)`."""
    report = rank_report(artifact, variance)
    return {"README.md": _card(artifact, report).encode(), "rank.png": rank_figure(artifact, report)}


def _card(artifact: Artifact, report: dict) -> str:
    model, data, settings, first = artifact.model, artifact.data, artifact.settings, artifact.layers[0]
    source = data.get("source", {})
    shape = (
        f"{len(artifact.layers)} layers, {first.kv_heads} KV heads, {first.query_heads} query heads, "
        f"head dim {first.head_dim}"
    )
    place = ", ".join(f"{name} {source[name]}" for name in ("config", "split", "revision") if source.get(name))
    ranks = "\n".join(
        f"| {name} | {report['model'][name]:.1f} |" for name in ("key_pre", "key_post", "query_post", "value")
    )
    return f"""---
{_front_matter(artifact)}
---

# kvcal artifact: {model.id} on {source.get("id", "text")}

Calibrated once, offline: moments, PCA bases, score-optimal bases and a reservoir of attention keys,
queries and values; the stages present are {", ".join(sorted(artifact.stages))}.

| | |
| --- | --- |
| model | {model.id}{f" at revision {model.revision}" if model.revision else ""} |
| weights sha256 | `{model.weights_sha256}` |
| shape | {shape} |
| text | {source.get("id", "text")}{f" ({place})" if place else ""} |
| text sha256 | `{data["content_sha256"]}` |
| tokens | {data["tokens_counted"]} counted, in {data["blocks"]} blocks of {data["seq_len"]} |
| settings | {", ".join(f"{name} {value}" for name, value in sorted(settings.items()))} |
| versions | {", ".join(f"{name} {value}" for name, value in sorted(artifact.versions.items()))} |

Mean rank@{100 * report["variance"]:g} over layers and KV heads:

| quantity | dimensions |
| --- | --- |
{ranks}

![Rank by layer and explained variance](rank.png)

```python
from kvcal.runtime import compress, load

artifact = load("{PLACE}")
with compress(model, artifact, method="loki", rank=0.25, keep=0.25):
    model.generate(**inputs)
```

The same model, text, settings, versions and number of threads on one machine give byte-identical tensor
files. At another batch size the model's own rounding differs: statistics then agree within 1e-5 relative in
float32. `calibrate verify` checks every hash; the format is specified in kvcal's docs/format.md.
"""


def _front_matter(artifact: Artifact) -> str:
    """What the Hub files the artifact under. JSON strings are YAML, whatever is in them."""
    model, source = artifact.model, artifact.data.get("source", {})
    lines = ["library_name: kvcal", "tags: [kvcal, kv-cache, calibration]"]
    # A model in a folder may be called as a repository is; only those of the Hub have a commit.
    if model.revision and _HUB_ID.fullmatch(model.id):
        lines.append(f"base_model: {json.dumps(model.id)}")
    if source.get("kind") == "hub":
        lines.append(f"datasets: [{json.dumps(str(source.get('id')))}]")
    return "\n".join(lines)
