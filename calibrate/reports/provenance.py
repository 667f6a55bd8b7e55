"""Where an artifact comes from: model, texts, settings, versions and hashes, as its manifest states them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...artifacts import Artifact
from ..plots import plain_name, short_name

STAGES = {
    "moments": "means and covariances of keys, queries and values",
    "pca": "a basis of each head's keys, in which few numbers hold most of their variance",
    "score": "a basis in which few numbers keep the products of queries and keys",
    "reservoir": "a random sample of keys, queries and values, from which the rest is fitted",
    "codebook": "typical keys and values, for which a whole group of tokens can stand",
    "clusters": "groups of similar keys",
    "cla": "layers that read one another's keys and values (cross-layer attention)",
    "xcla": "few-bit coefficients that stand for the keys and values of neighbouring layers",
}


@dataclass(frozen=True)
class FittedStage:
    name: str
    meaning: str
    megabytes: float | None
    """Of its file; None: the artifact is in memory only."""
    settings: str
    sha256: str


@dataclass(frozen=True)
class Provenance:
    model: str
    text: str
    tokens: int | None
    shape: str
    """"30 layers, 3 KV heads, …"."""
    layers: int
    kv_heads: int
    head_dim: int
    stages: tuple[FittedStage, ...]
    megabytes: float | None
    """Of all stages."""
    entries: tuple[tuple[str, str], ...]
    """(name, value) of all that makes the artifact again, and hashes."""


def provenance(artifact: Artifact) -> Provenance:
    model, data, first = artifact.model, artifact.data, artifact.layers[0]
    stages = tuple(_stage(name, stage) for name, stage in artifact.stages.items())
    sizes = [stage.megabytes for stage in stages]
    entries = {
        "model": model.id,
        "model revision": model.revision or "–",
        "weights sha256": model.weights_sha256,
        **({"slim form of content": artifact.slim_of.content_hash} if artifact.slim_of else {}),
        "text sha256": data.get("content_sha256", "–"),
        "blocks": f"{data.get('blocks', '–')} of {data.get('seq_len', '–')} tokens",
        **{f"setting {name}": value for name, value in sorted(artifact.settings.items())},
        **{f"version of {name}": value for name, value in sorted(artifact.versions.items())},
        "content hash of the artifact": artifact.content_hash or "not saved yet",
    }
    entries |= {f"text {number + 1}": text for number, text in enumerate(_texts(data.get("source", {})))}
    tokens = data.get("tokens_counted")
    return Provenance(
        model=short_name(plain_name(model.id)),
        text=short_name(plain_name(data.get("source", {}).get("id", "text"))),
        tokens=tokens if isinstance(tokens, int) else None,
        shape=f"{len(artifact.layers)} layers, {first.kv_heads} KV heads and {first.query_heads} query heads in each, "
        f"{first.head_dim} numbers per key",
        layers=len(artifact.layers),
        kv_heads=first.kv_heads,
        head_dim=first.head_dim,
        stages=stages,
        megabytes=sum(size for size in sizes if size is not None) if None not in sizes else None,
        entries=tuple((short_name(name), short_name(value, 500)) for name, value in entries.items()),
    )


def _stage(name: str, stage: Any) -> FittedStage:
    file = getattr(stage.tensors, "file", None)
    return FittedStage(
        name=short_name(name),
        meaning=STAGES.get(name, ""),
        megabytes=file.bytes / 1e6 if file else None,
        settings=short_name(", ".join(f"{key} {value}" for key, value in stage.settings.items()), 200),
        sha256=file.sha256 if file else "–",
    )


def _texts(source: Mapping[str, Any]) -> list[str]:
    """A line for each text that was read."""
    several = source.get("sources")
    parts = several if isinstance(several, list) else [source]
    return [", ".join(f"{name} {value}" for name, value in part.items()) for part in parts if isinstance(part, Mapping)]
