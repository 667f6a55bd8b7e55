"""The card of an artifact: what it is, where it comes from, what to expect of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..artifacts import Artifact
from .markdown import code, front_matter
from .plots import rank_figure
from .rank import means_are_of, rank_report
from .sample_size import small_sample

PLACE = "THIS FOLDER OR ITS HUB ID"
"""What the card's example loads, until it is known where the artifact lies on the Hub."""
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)


def card_files(artifact: Artifact, variance: float = 0.9) -> dict[str, bytes]:
    """README.md and rank.png, for `artifacts.save(..., extras=)`."""
    report = rank_report(artifact, variance)
    return {"README.md": _card(artifact, report).encode(), "rank.png": rank_figure(artifact, report)}


def _card(artifact: Artifact, report: dict[str, Any]) -> str:
    model, data, settings, first = artifact.model, artifact.data, artifact.settings, artifact.layers[0]
    source = data.get("source", {})
    shape = (
        f"{len(artifact.layers)} layers, {first.kv_heads} KV heads, {first.query_heads} query heads, "
        f"head dim {first.head_dim}"
    )
    if (full := len(artifact.full_layers)) < len(artifact.layers):
        shape += f"; {full} layers with full attention, {len(artifact.layers) - full} with a sliding window"
    text_id = code(source.get("id", "text"))
    place = ", ".join(f"{name} {code(source[name])}" for name in ("config", "split", "revision") if source.get(name))
    ranks = "\n".join(
        f"| {name} | {report['model'][name]:.1f} |" for name in ("key_pre", "key_post", "query_post", "value")
    )
    note = means_are_of(report)
    small = small_sample(artifact)
    warning = f"\n**Few tokens.** {small}.\n" if small else ""
    averaged = f" (sliding window in some: {note})" if note else ""
    return f"""{front_matter(_filed_under(artifact))}

# kvcal artifact: {code(model.id)} on {text_id}

What was learned about the keys, queries and values of attention, once and offline; the stages present are
{", ".join(sorted(artifact.stages))}.
{slim_note(artifact)}
| | |
| --- | --- |
| model | {code(model.id)}{f" at revision {code(model.revision)}" if model.revision else ""} |
| weights sha256 | `{model.weights_sha256}` |
| shape | {shape} |
| text | {text_id}{f" ({place})" if place else ""} |
| text sha256 | `{data["content_sha256"]}` |
| tokens | {data["tokens_counted"]} counted, in {data["blocks"]} blocks of {data["seq_len"]} |
| settings | {_listed(settings)} |
| versions | {_listed(artifact.versions)} |

Mean rank@{100 * report["variance"]:g} over layers and KV heads{averaged}:

| quantity | dimensions |
| --- | --- |
{ranks}
{warning}
![Rank by layer and explained variance](rank.png)

```python
from kvcal.runtime import compress, load

artifact = load("{PLACE}")
with compress(model, artifact, method="loki", keep=0.25):
    model.generate(**inputs)
```

The same model, text, settings, versions and number of threads on one machine give byte-identical tensor
files. At another batch size the model's own rounding differs: statistics then agree within 1e-5 relative in
float32. `calibrate verify` checks every hash; the format is specified in kvcal's docs/format.md.
"""


def slim_note(artifact: Artifact) -> str:
    """A paragraph for the card of a slim artifact, "" for another's."""
    full = artifact.slim_of
    if full is None:
        return ""
    size = sum(full.stages[name]["bytes"] for name in artifact.left_out) / 1e6
    return f"""
**Slim**: {" and ".join(artifact.left_out)}, which nothing decodes with ({size:.1f} MB), are left out of the artifact
with content `{full.content_hash}`. Clusterings, codes and sharing are fitted with that one.
"""


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(code(f"{name} {value}") for name, value in sorted(values.items()))


def _filed_under(artifact: Artifact) -> dict[str, Any]:
    """What the Hub files the artifact under; it links to repositories only."""
    model, source = artifact.model, artifact.data.get("source", {})
    entries: dict[str, Any] = {"library_name": "kvcal", "tags": ["kvcal", "kv-cache", "calibration"]}
    # A folder may have the name of a repository; only models of the Hub have a commit.
    if model.revision and "/" in model.id and _HUB_ID.fullmatch(model.id):
        entries["base_model"] = model.id
    data_id = str(source.get("id"))
    if source.get("kind") == "hub" and _HUB_ID.fullmatch(data_id):
        entries["datasets"] = [data_id]
    return entries
