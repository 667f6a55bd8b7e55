"""Check that the manifest agrees with itself where it says something in several places."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...artifacts import Artifact
from ...artifacts.claims import require_that
from ...artifacts.manifest import MANIFEST


def check_manifest(artifact: Artifact) -> None:
    """Fingerprint against layers, token counts against blocks, and settings."""
    where = f"{artifact.name}, {MANIFEST}"
    _check_fingerprint(artifact, where)
    data = artifact.data
    positions, counted = data["blocks"] * data["seq_len"], data["tokens_counted"]
    require_that(where, "tokens_counted", 2 <= counted <= positions, counted, f"2 to {positions}, blocks times seq_len")
    settings = artifact.settings
    kinds: dict[str, tuple[type, int]] = {"reservoir": (int, 2), "batch_size": (int, 1), "centred": (bool, 0)}
    for name, (kind, least) in kinds.items():
        if name in settings:
            found = settings[name]
            holds = type(found) in (kind,) and found >= least
            require_that(where, f"settings: {name}", holds, found, f"{kind.__name__} of at least {least}")


def _check_fingerprint(artifact: Artifact, where: str) -> None:
    """The fingerprint holds for one of the layers at least: they may differ from one another."""
    told, layers = artifact.model.fingerprint, artifact.layers
    number = told.get("num_hidden_layers")
    if type(number) is int:
        require_that(where, "layers", len(layers) == number, f"{len(layers)} layers", f"{number}, num_hidden_layers")
    fields = {"num_attention_heads": "query_heads", "num_key_value_heads": "kv_heads", "head_dim": "head_dim"}
    for name, field in fields.items():
        wanted, found = told.get(name), sorted({getattr(layer, field) for layer in layers})
        # Latent attention has keys of another width than the config's head dim, and values of a third.
        latent = field == "head_dim" and any(layer.value_dim != layer.head_dim for layer in layers)
        if type(wanted) is int and not latent:
            require_that(where, f"layers: {field}", wanted in found, found, f"{wanted}, the fingerprint's {name}")
    window = told.get("sliding_window")
    for layer in layers:
        holds = layer.window is None or type(window) is not int or layer.window == window
        require_that(where, f"layer {layer.index}: window", holds, layer.window, f"{window}, sliding_window, or null")
    rope = told.get("rope_parameters")
    require_that(where, "rope_parameters", rope is None or isinstance(rope, dict), rope, "an object or null")
    _check_rotation(where, "rope_parameters", rope or {})


def _check_rotation(where: str, name: str, found: Mapping[str, Any]) -> None:
    """Rotary parameters, flat or one object for every type of layer."""
    for key, value in found.items():
        if isinstance(value, dict):
            _check_rotation(where, f"{name}.{key}", value)
        if type(value) in (int, float):
            holds = math.isfinite(value) and (value > 0 or key not in ("rope_theta", "factor"))
            require_that(where, f"{name}.{key}", holds, value, "a positive number")
