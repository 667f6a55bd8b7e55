"""Tell models apart: by architecture (quick, any dtype) and by weights (exact)."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

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


@torch.no_grad()
def weights_sha256(model: nn.Module, whole: Callable[[str, Tensor], Tensor | None] | None = None) -> str:
    """sha256 over all parameters by name, as float32: a bf16 checkpoint has one hash loaded as bf16 or as float32.

    A dtype that rounds the checkpoint (float32 weights loaded as bf16) is other weights, and another hash.

    Args:
        whole: gives the whole of a parameter, by its name, where the model here holds a part of it or none; None for
            one that is the same as another.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        weight = whole(name, parameter) if whole is not None else parameter
        if weight is None:
            continue
        digest.update(f"{name} {list(weight.shape)}\n".encode())
        # In pieces: an embedding of a large model in float32 is several GB.
        for piece in weight.detach().flatten().split(1 << 24):
            update_digest(digest, piece.to("cpu", torch.float32))
    return digest.hexdigest()


def update_digest(digest: Any, tensor: Tensor) -> None:
    """Feed a CPU tensor's bytes to a hash, without numpy and without a copy."""
    tensor = tensor.contiguous()
    if tensor.numel():
        digest.update((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))


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
