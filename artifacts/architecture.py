"""Tell architectures apart; `weights` tells models of one architecture apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FIELDS = (
    "model_type",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_size",
    "vocab_size",
    "rope_parameters",
    "sliding_window",
    "layer_types",
)


def fingerprint(config: Any) -> dict[str, Any]:
    """The architecture fields of a transformers config that an artifact depends on.

    Duck-typed: `config` needs attributes only, so the runtime does not import transformers.
    For a multi-modal model it is the text part's.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return {name: _plain(_field(text, name)) for name in _FIELDS}


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(field, expected, found) wherever two mappings disagree, in sorted order of the field."""
    fields = sorted(expected.keys() | found.keys())
    return [(name, expected.get(name), found.get(name)) for name in fields if expected.get(name) != found.get(name)]


def _field(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # configs whose layers differ refuse to give one value for all of them
        return vars(config).get(name)


def _plain(value: Any) -> Any:
    """JSON-able form, so that what is compared is what a manifest can hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in sorted(value.items())}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
