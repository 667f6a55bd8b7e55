"""A shared model as a checkpoint folder of its own."""

from __future__ import annotations

import os
from pathlib import Path

from ...artifacts import Artifact
from ...artifacts.writing import new_folder
from ...runtime.cla.folder import write_cla
from ...runtime.cla.method import STAGE, Cla, resolve, stage_map
from ...runtime.cla.sharing import shared
from ..markdown import code, front_matter
from ..models import LoadedModel
from .uptrained_stage import steps_in_all

CARD = """{front_matter}

# {model}, sharing keys and values between layers ({groups})

Cross-layer attention (Brandon et al. 2024): the first layer of each group projects and stores keys and values, the
others read them. {training}

transformers alone would fill the projections that are not here with random numbers; load it with

```python
from kvcal.runtime.cla import load_cla

model = load_cla("THIS FOLDER")
```

A plain `model.generate()` keeps keys and values of all {total} layers, as transformers' own cache does. With kvcal's
cache only the {stored} layers that store them do:

```python
from kvcal.runtime import compress

with compress(model, method="full"):
    model.generate(...)
```
"""


def export(artifact: Artifact, loaded: LoadedModel, folder: str | os.PathLike[str]) -> Path:
    """Write config, tokenizer, the map and the weights of the shared model; `kvcal.runtime.cla.load_cla` loads it.

    The weights are those that uptraining left in the stage `cla`, or pooled ones where there was none, in the model's
    dtype. The folder appears whole or not at all. Returns it.

    Raises:
        KvcalError: the stage is missing or does not fit the model, something is at `folder`, or the disk is full.
    """
    folder = Path(folder)
    stage_map(artifact)
    found, settings, model = resolve(Cla(), artifact), artifact.stages[STAGE].settings, loaded.model
    origin = {
        "model": artifact.model.id,
        "revision": artifact.model.revision,
        "weights_sha256": artifact.model.weights_sha256,
        "artifact": artifact.content_hash,
        **{name: settings.get(name) for name in ("pool", "uptraining")},
    }
    with new_folder(folder) as building:
        with shared(model, found.map, pool=found.pool, weights=found.weights):
            write_cla(model, building, origin)
        loaded.tokenizer.save_pretrained(building)
        (building / "README.md").write_text(_card(artifact, len(found.map.reading)), "utf-8")
    return folder


def _card(artifact: Artifact, reading: int) -> str:
    settings, total = artifact.stages[STAGE].settings, len(artifact.layers)
    done = settings.get("uptraining")
    steps = steps_in_all(done) if done else 0
    start = "Fitted to text and not uptrained" if done else "Not uptrained"
    how = f"Uptrained for {steps} steps." if steps else f"{start}: it predicts badly."
    filed_under = {"library_name": "kvcal", "tags": ["kvcal", "kv-cache", "cross-layer-attention"]}
    return CARD.format(
        front_matter=front_matter(filed_under),
        model=code(artifact.model.id),
        groups=code(settings["groups"]),
        stored=total - reading,
        total=total,
        training=how,
    )
