"""What an artifact is, for people and for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .numbers import megabytes
from .output import print_lines, say

if TYPE_CHECKING:
    from ...artifacts import Artifact


def artifact_summary(artifact: Artifact) -> dict[str, Any]:
    first = artifact.layers[0]
    return {
        "artifact": str(artifact.folder),
        "content_hash": artifact.content_hash,
        "slim_of": artifact.slim_of and dataclasses.asdict(artifact.slim_of),
        "left_out": list(artifact.left_out),
        "model": {**artifact.model.fingerprint, "id": artifact.model.id, "revision": artifact.model.revision},
        "weights_sha256": artifact.model.weights_sha256,
        "layers": len(artifact.layers),
        "kv_heads": first.kv_heads,
        "query_heads": first.query_heads,
        "head_dim": first.head_dim,
        "pre_rotary": sorted({layer.pre_rotary for layer in artifact.layers}),
        "sliding_layers": [layer.index for layer in artifact.layers if layer.window],
        "data": dict(artifact.data),
        "settings": dict(artifact.settings),
        "versions": dict(artifact.versions),
        "stages": {
            name: {
                "file": stage.tensors.file.file,  # type: ignore[attr-defined]
                "bytes": stage.tensors.file.bytes,  # type: ignore[attr-defined]
                "tensors": len(stage.tensors),
                "settings": dict(stage.settings),
            }
            for name, stage in artifact.stages.items()
        },
    }


def say_small_sample(artifact: Artifact) -> None:
    """Say so where an artifact was calibrated on too few tokens for its head dim."""
    from ..sample_size import small_sample

    if problem := small_sample(artifact):
        say(f"{artifact.name}: {problem}")


def print_summary(summary: dict[str, Any]) -> None:
    data, source = summary["data"], summary["data"]["source"]
    revision = f" @ {summary['model']['revision']}" if summary["model"]["revision"] else ""
    split = f" ({source['split']})" if source.get("split") else ""
    lines = {
        "artifact": summary["artifact"],
        "model": f"{summary['model']['id']}{revision} · {summary['model'].get('model_type')}",
        "shape": f"{summary['layers']} layers · {summary['kv_heads']} KV heads · {summary['query_heads']} query heads "
        f"· head dim {summary['head_dim']}",
        "text": f"{source.get('id', 'text')}{split} · {data['tokens_counted']} tokens in {data['blocks']} blocks "
        f"of {data['seq_len']}",
        "pre-rotary": ", ".join(summary["pre_rotary"]),
        "content": summary["content_hash"],
    }
    if summary["sliding_layers"]:
        sliding = ", ".join(map(str, summary["sliding_layers"]))
        lines["sliding"] = f"layers {sliding}: a window each, which methods leave alone"
    if slim := summary["slim_of"]:
        size = sum(slim["stages"][name]["bytes"] for name in summary["left_out"])
        left_out = " and ".join(summary["left_out"])
        lines["slim"] = f"{left_out} left out, {megabytes(size)}, of content {slim['content_hash']}"
    for name, text in lines.items():
        print_lines(f"{name:<11} {text}")
    for name, stage in summary["stages"].items():
        settings = ", ".join(f"{key} {_in_short(name, key, value)}" for key, value in stage["settings"].items())
        print_lines(f"  {name:<10} {megabytes(stage['bytes']):>10}  {stage['tensors']:>4} tensors  {settings}".rstrip())


def _in_short(stage: str, name: str, value: Any) -> Any:
    """Of an uptraining its steps, with those it went on from, and its losses; of the costs of groups how many; every
    other value as it is."""
    from ..cla.uptrained_stage import steps_in_all

    if (stage, name) == ("cla", "group_costs"):
        return f"of {len(value)} groups"
    if (stage, name) != ("cla", "uptraining") or value is None:
        return value
    first, last = value["first_losses"], value["last_losses"]
    losses = ", ".join(f"{name.replace('_', ' ')} {first[name]:.3f} → {last[name]:.3f}" for name in first)
    if not value.get("earlier"):
        return f"{value['steps']} steps ({losses})" if first else "fitted, no steps"
    return f"{steps_in_all(value)} steps in {_trainings(value)} trainings (the last {value['steps']}: {losses})"


def _trainings(uptraining: Mapping[str, Any]) -> int:
    """How many there were, with those that a training went on from; a fit without steps is none."""
    earlier = uptraining.get("earlier")
    return (uptraining["steps"] > 0) + (_trainings(earlier) if earlier else 0)
