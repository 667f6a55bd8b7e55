"""What `spectral` asks of settings and of artifacts: one line each where they do not do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import samples
import torch

from kvcal.artifacts import Artifact, KvcalError, load, save
from kvcal.calibrate.cla import share
from kvcal.calibrate.codebook_stage import codebook
from kvcal.runtime.attention import SoftmaxSpec
from kvcal.runtime.settings import builders, methods_by_layer

D, LAYERS, TOKENS = 16, 2, 96
MADE = samples.artifact(layers=LAYERS, head_dim=D, value_dim=D, tokens=TOKENS)


def built(artifact: Artifact | None, **settings: Any) -> Any:
    return builders(methods_by_layer("spectral", settings, range(LAYERS), LAYERS), [D] * LAYERS, artifact)


def without_windows(made: Artifact) -> Artifact:
    """Layer 0 slides, and the reservoir has nothing of it."""
    reservoir = made.stages["reservoir"]
    kept = {name: tensor for name, tensor in reservoir.tensors.items() if not name.startswith("layers.0.")}
    layers = (replace(made.layers[0], window=8), *made.layers[1:])
    return replace(made, layers=layers).with_stage("reservoir", replace(reservoir, tensors=kept))


OLD = {1: MADE, 2: share(MADE), 3: without_windows(MADE)}


@pytest.mark.parametrize("version", OLD)
def test_artifacts_from_before_codebooks_are_told_the_command(version: int, tmp_path: Path) -> None:
    folder = save(OLD[version], tmp_path / "old").folder
    assert json.loads((folder / "manifest.json").read_text())["schema_version"] == version
    loaded = load(folder)
    with pytest.raises(KvcalError) as caught:
        built(loaded)
    message = str(caught.value)
    assert message.startswith("spectral, layer 0: ") and "\n" not in message
    assert "no stage 'codebook'" in message and message.endswith("calibrate cluster ARTIFACT --metric joint`")
    fitted = load(save(codebook(loaded, codewords=6), tmp_path / "new").folder)
    store = builders(methods_by_layer("spectral", {"keep": 0.5}, [1], LAYERS), [D] * LAYERS, fitted)[1]()
    tokens = torch.randn(1, 4, 40, D, generator=torch.Generator().manual_seed(0))
    store.prefill(tokens, tokens[:, :2], tokens[:, :2], SoftmaxSpec(D**-0.5))
    store.append(tokens[:, :2, :1], tokens[:, :2, :1])
    assert store.attend(tokens[:, :, :1], SoftmaxSpec(D**-0.5)).isfinite().all()


def test_no_artifact() -> None:
    with pytest.raises(KvcalError, match=r"^spectral, layer 0: spectral needs an artifact: [^\n]*calibrate pca[^\n]*$"):
        built(None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, "bits 3: give 2, 4 or 8"),
        ({"bits": True}, "bits True: give 2, 4 or 8"),
        ({"rows": 4}, "rows 4: give 16, 8 or xcla"),
        ({"rows": "8"}, "rows '8': give 16, 8 or xcla"),
        ({"rank": 17}, "rank 17 is above the head dim 16"),
        ({"rank": 6}, "rank 6: codes take a multiple of 16, e.g. 16"),
        ({"rank": "most"}, "rank 'most': "),
        ({"keep": 0}, "keep 0: "),
        ({"select": "mean"}, "select 'mean': give head or group or max"),
        ({"choice": "threshold"}, "choice .threshold.: give exact or sampled"),
        ({"sample": 15}, "sample 15: "),
        ({"recent": 0}, "recent 0: "),
        ({"sinks": -1}, "sinks -1: "),
        ({"residual": 1}, "residual 1: "),
        ({"offload": "disk"}, "offload 'disk': give none or cpu"),
        ({"cached": 0}, "cached 0: "),
    ],
    ids=str,
)
def test_settings_that_mean_nothing(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(KvcalError, match=f"^spectral, layer 0: {message}[^\n]*$"):
        built(codebook(MADE, codewords=6), **settings)


@pytest.mark.parametrize("name", ["clip", "tail", "flat_below", "tokens_per_cluster", "basis", "stage"])
def test_settings_of_its_predecessor_are_told_those_that_there_are(name: str) -> None:
    with pytest.raises(KvcalError, match=f"^spectral has no parameter '{name}': there are bits, .* sinks, and dense"):
        built(codebook(MADE, codewords=6), **{name: 1})
