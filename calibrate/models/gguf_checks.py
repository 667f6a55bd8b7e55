"""What a GGUF file has to be before transformers reads it, and what transformers has to have read out of it.

transformers takes a fixed list of keys by architecture and passes over the others, also over those that change what the
model computes: rotary scaling, soft caps, scales. Such a model would be another one without a word.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...artifacts import KvcalError
from ...runtime.integration.checkpoint_json import check_config
from .gguf_file import split_file
from .gguf_header import GgufHeader

ROPE_FACTORS = "rope_freqs.weight"
"""Divisors of the rotary frequencies, which llama.cpp computes from the config of Llama 3.1 and later."""
_SIZES = {
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "expert_count": "num_experts",
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
}
_NO_MODELS = {
    "clip": "sees images for another model",
    "mmproj": "sees images for another model",
    "adapter": "is an adapter for another model",
    "imatrix": "is an importance matrix for quantising",
}
_TOKENIZERS = ("gpt2", "llama", "gemma4")
_OWN_SCALE = {"gemma2": 46, "gemma3": 62}
"""Layers of the 27B models: they scale queries by another number than their family does, which no key states."""
_WITHOUT_EFFECT = ("rope.scaling.finetuned", "tensor_data_layout", "context_length", "source.url")


def check_header(header: GgufHeader, name: str) -> None:
    """Raises KvcalError: no language model, a part of one, or sizes that its tensors do not fill."""
    metadata, architecture = header.metadata, header.architecture
    if not architecture:
        raise KvcalError(f"{name}: does not say of which architecture it is (general.architecture): get another file")
    for kind in (architecture, str(metadata.get("general.type"))):
        if kind in _NO_MODELS:
            raise KvcalError(f"{name}: {_NO_MODELS[kind]} ({kind}): give the GGUF file of the language model")
    parts = metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        number = metadata.get("split.no", 0)
        raise split_file(name, f"part {number + 1} of {parts}" if isinstance(number, int) else f"one of {parts} parts")
    if not header.tensors:
        raise KvcalError(f"{name}: has a vocabulary and no weights: give the GGUF file of the whole model")
    if not header.lengths.get("tokenizer.ggml.tokens"):
        raise KvcalError(f"{name}: has no vocabulary (tokenizer.ggml.tokens): get another file of this model")
    tokenizer = metadata.get("tokenizer.ggml.model")
    if tokenizer not in _TOKENIZERS:
        raise KvcalError(
            f"{name}: its tokenizer is a {str(tokenizer)[:80]!r}, transformers rebuilds {', '.join(_TOKENIZERS)}: give "
            "its original checkpoint"
        )
    prefix = f"{architecture}."
    sizes = {_SIZES[key]: metadata[prefix + key] for key in _SIZES if prefix + key in metadata}
    check_config(Path(name), sizes)
    layers = {tensor.name.split(".")[1] for tensor in header.tensors if tensor.name.startswith("blk.")}
    stated = sizes.get("num_hidden_layers", 0)
    if not isinstance(stated, int) or stated > len(layers):
        raise KvcalError(f"{name}: has tensors of {len(layers)} layers and states {stated}: get another file")
    _check_tensors(header, name)


def _check_tensors(header: GgufHeader, name: str) -> None:
    """Check that the data of all tensors are there, and of types that can be unpacked."""
    import gguf
    import numpy as np

    sizes: dict[int, tuple[int, int]] = {}
    for kind in sorted({tensor.type for tensor in header.tensors}):
        try:
            ggml = gguf.GGMLQuantizationType(kind)
            sizes[kind] = gguf.GGML_QUANT_SIZES[ggml]
            gguf.dequantize(np.zeros(sizes[kind][1], np.uint8), ggml)
        except (ValueError, KeyError, NotImplementedError):
            first = next(tensor.name for tensor in header.tensors if tensor.type == kind)
            raise KvcalError(
                f"{name}: tensor {first} is of ggml type {kind}, which this version of the package gguf cannot unpack: "
                "get the model quantised in another way, e.g. Q8_0 or Q4_K_M"
            ) from None
    for tensor in header.tensors:
        block, width = sizes[tensor.type]
        if tensor.shape[0] % block:
            raise KvcalError(f"{name}: tensor {tensor.name}: rows of {tensor.shape[0]} are no whole blocks of {block}")
        if tensor.offset + tensor.numbers // block * width > header.size:
            raise KvcalError(
                f"{name}: is not a whole GGUF file (it has {header.size} bytes and ends before tensor {tensor.name} "
                "does): fetch it again"
            )


def check_described(header: GgufHeader, config: Any, weights: int, name: str) -> None:
    """Check that the config that transformers made is of this very model.

    Args:
        weights: numbers in the model that transformers builds from the config.

    Raises:
        KvcalError: a key that it has passed over or read otherwise, or tensors that have no place in the model.
    """
    prefix = f"{header.architecture}."
    for key, stated in header.metadata.items():
        if key.startswith(prefix) and (problem := _unlike(key.removeprefix(prefix), stated, config)):
            raise KvcalError(
                f"{name}: {key} is {str(stated)[:80]}, {problem}: transformers reads it as another model from GGUF: "
                "give its original checkpoint"
            )
    window = getattr(config.get_text_config(), "sliding_window", None)
    if window and f"{prefix}attention.sliding_window" not in header.metadata:
        raise KvcalError(f"{name}: states no sliding window, transformers reads one of {window}: give its checkpoint")
    if header.metadata.get(f"{prefix}block_count", -1) == _OWN_SCALE.get(header.architecture):
        raise KvcalError(
            f"{name}: {header.architecture} of 27B scales its queries by a number that GGUF does not state: give its "
            "original checkpoint"
        )
    stored = sum(tensor.numbers for tensor in header.tensors if tensor.name != ROPE_FACTORS)
    if stored != weights:
        extra = [tensor.name for tensor in header.tensors if tensor.name.startswith("rope_") and len(tensor.shape) == 1]
        more = f", among them {extra[0]}" if extra and extra[0] != ROPE_FACTORS else ""
        raise KvcalError(
            f"{name}: has {stored} weights{more}, the model that transformers builds from its metadata has {weights}: "
            "give its original checkpoint"
        )


def _unlike(key: str, stated: Any, config: Any) -> str | None:
    """What is wrong with a key of the architecture; None: nothing."""
    if key in _WITHOUT_EFFECT or (key == "rope.scaling.type" and stated == "none"):
        return None
    if key not in _READ:
        return "which transformers does not read"
    found = _READ[key](config.get_text_config())
    same = stated == found or (not stated and not found)
    if isinstance(found, (int, float)) and isinstance(stated, (int, float)):
        same = math.isclose(stated, found, rel_tol=1e-6)
    return None if same else f"in transformers' config it is {found}"


def _first(*names: str) -> Callable[[Any], Any]:
    def read(config: Any) -> Any:
        return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)

    return read


def _head_dim(config: Any) -> Any:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _kv_heads(config: Any) -> Any:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _rope(config: Any) -> dict[str, Any]:
    """Rotary parameters of the layers with full attention."""
    found = getattr(config, "rope_parameters", None) or {}
    return found.get("full_attention", found)


def _rotated(config: Any) -> Any:
    part = _rope(config).get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    return int(_head_dim(config) * part)


_READ: dict[str, Callable[[Any], Any]] = {
    "block_count": _first("num_hidden_layers"),
    "embedding_length": _first("hidden_size"),
    "feed_forward_length": lambda config: _first("intermediate_size", "n_inner")(config) or 4 * config.hidden_size,
    "vocab_size": _first("vocab_size"),
    "attention.head_count": _first("num_attention_heads"),
    "attention.head_count_kv": _kv_heads,
    "attention.key_length": _head_dim,
    "attention.value_length": _head_dim,
    "attention.layer_norm_rms_epsilon": _first("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attention.layer_norm_epsilon": _first("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention.sliding_window": _first("sliding_window"),
    "attn_logit_softcapping": _first("attn_logit_softcapping"),
    "final_logit_softcapping": _first("final_logit_softcapping"),
    "rope.freq_base": lambda config: _rope(config).get("rope_theta"),
    "rope.dimension_count": _rotated,
    "use_parallel_residual": _first("use_parallel_residual"),
    "expert_count": _first("num_experts", "num_local_experts"),
    "expert_used_count": _first("num_experts_per_tok"),
    "expert_feed_forward_length": _first("moe_intermediate_size"),
    "expert_shared_feed_forward_length": _first("shared_expert_intermediate_size"),
}
