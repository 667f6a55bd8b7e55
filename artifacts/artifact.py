"""What calibration learned about one model on one text, frozen."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .claims import MOST, bounded
from .errors import ArtifactError
from .pretrained import Pretrained
from .shown import Shown


@dataclass(frozen=True)
class Layer:
    """The shape of one attention layer, as seen in the calibration pass."""

    index: int
    kv_heads: int
    query_heads: int
    head_dim: int
    value_dim: int
    scaling: float
    """Factor on q·k before the softmax."""
    window: int | None
    """Sliding window in tokens; None for full attention."""
    pre_rotary: str
    """How pre-rotary tensors were obtained: "unrotate", "replay", or "none" when the layer has no rotary embedding."""


@dataclass(frozen=True, repr=False)
class ModelIdentity(Shown):
    """Which model an artifact belongs to."""

    id: str
    revision: str | None
    fingerprint: Mapping[str, Any]
    """Architecture: see `fingerprint()`."""
    weights_sha256: str
    """Over the weights actually loaded: see `weights_sha256()`."""

    def facts(self) -> dict[str, str]:
        revision = f"@{self.revision}" if self.revision else ""
        return {"id": self.id + revision, "type": str(self.fingerprint.get("model_type"))}


@dataclass(frozen=True, repr=False)
class Stage(Shown):
    """One stage's settings, what it measured in a few numbers, and its tensors."""

    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def facts(self) -> dict[str, str]:
        return {"tensors": str(len(self.tensors)), "settings": str(dict(self.settings))}


@dataclass(frozen=True)
class FullForm:
    """What the manifest of an artifact said before it was made slim."""

    content_hash: str
    schema_version: int
    stages: Mapping[str, Mapping[str, Any]]
    """Of every stage, those that were left out among them: file, sha256, bytes and settings."""


@dataclass(frozen=True, repr=False)
class Artifact(Shown, Pretrained):
    """A calibration result. In memory after `calibrate()`, on disk after `save_pretrained()`."""

    model: ModelIdentity
    layers: tuple[Layer, ...]
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    stages: Mapping[str, Stage]
    folder: Path | None = None
    """Where it was loaded from or saved to."""
    content_hash: str | None = None
    """sha256 over the manifest, and through it over every tensor, of what is in `folder`; None before it is saved."""
    slim_of: FullForm | None = None
    """The artifact that this one is the slim form of; None: it is none."""

    def facts(self) -> dict[str, str]:
        source = self.data.get("source", {})
        return {
            "of": self.model.id,
            "text": f"{self.data.get('tokens_counted')} tokens of {source.get('id', 'text')}",
            "layers": str(len(self.layers)),
            "stages": " ".join(sorted(self.stages)),
            "folder": str(self.folder) if self.folder else "none: not saved yet",
        }

    def tensor(self, stage: str, layer: int, name: str) -> Tensor:
        """One tensor, e.g. `artifact.tensor("pca", 3, "key_post.components")`.

        Raises:
            ArtifactError: no such stage, layer or tensor; says which there are.
        """
        self.require(stage)
        if not 0 <= layer < len(self.layers):
            raise ArtifactError(f"{self.name}: no layer {layer}, it has {len(self.layers)}")
        tensors, prefix = self.stages[stage].tensors, f"layers.{layer}."
        if prefix + name not in tensors:
            if self.layers[layer].window is not None and layer not in indices_in(tensors):
                raise ArtifactError(
                    f"{self.name}: stage {stage} has nothing of layer {layer}, which has a sliding window: "
                    "methods leave such layers alone"
                )
            have = ", ".join(sorted(key.removeprefix(prefix) for key in tensors if key.startswith(prefix)))
            raise ArtifactError(f"{self.name}: no tensor {name!r} in stage {stage} (a layer has: {have})")
        return tensors[prefix + name]

    def require(self, *stages: str) -> None:
        """Raise ArtifactError for the first of these stages that is not there; says which are, and where to get it."""
        for stage in stages:
            if stage in self.stages:
                continue
            have, source = ", ".join(sorted(self.stages)) or "none", _COMMANDS.get(stage, "")
            if self.slim_of is not None and stage in self.left_out:
                source = (
                    f"it is slim: use the full artifact, content {self.slim_of.content_hash[:12]}…, or {source} anew"
                )
            raise ArtifactError(f"{self.name}: no stage {stage!r} (it has: {have}); {source}".strip())

    @property
    def left_out(self) -> tuple[str, ...]:
        """Stages that the full artifact has and this slim one has not, ascending."""
        return tuple(sorted(self.slim_of.stages.keys() - self.stages.keys())) if self.slim_of else ()

    def layers_in(self, stage: str) -> list[Layer]:
        """The layers that `stage` has tensors of: some stages leave out those with a sliding window."""
        held = indices_in(self.stages[stage].tensors)
        return [layer for layer in self.layers if layer.index in held]

    @property
    def full_layers(self) -> list[Layer]:
        """Layers whose attention sees all tokens, which methods compress; the others keep the model's own cache."""
        return [layer for layer in self.layers if layer.window is None]

    def finite(self, stage: str, layer: int, name: str) -> Tensor:
        """`tensor`, with a check of the values that `load` leaves unchecked: the moments and the reservoir's rows.

        Raises:
            ArtifactError: as `tensor`; or it holds NaN, an infinity or a number beyond all measure.
        """
        tensor = self.tensor(stage, layer, name)
        bounded(f"{self.name}, stage {stage}", f"layers.{layer}.{name}", tensor, -(MOST**2), MOST**2)
        return tensor

    def with_stage(self, name: str, stage: Stage) -> Artifact:
        """A copy that has `stage` under `name`; `save()` it to write it."""
        return dataclasses.replace(self, stages={**self.stages, name: stage})

    @property
    def name(self) -> str:
        return str(self.folder) if self.folder else f"artifact of {self.model.id}"


def indices_in(names: Iterable[str]) -> set[int]:
    """Indices of the layers that tensors of these names belong to."""
    found = (name.split(".", 2)[1] for name in names if name.startswith("layers."))
    return {int(index) for index in found if index.isdecimal()}


_COMMANDS = {
    "cla": "make it with `calibrate share ARTIFACT --model MODEL`",
    "clusters": "make it with `calibrate cluster ARTIFACT`",
    "codebook": "make it with `calibrate cluster ARTIFACT --metric joint`",
    "xcla": "make it with `calibrate xcla ARTIFACT --model MODEL`",
    "pca": "make it with `calibrate pca`",
    "score": "make it with `calibrate pca`",
    "moments": "make it with `calibrate pca`",
    "reservoir": "make it with `calibrate pca`",
}
