"""GGUF files of tiny models, written as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

VOCAB = 300
_BYTES = {**{byte: chr(byte) for byte in [*range(33, 127), *range(161, 173), *range(174, 256)]}}
ALPHABET = [*_BYTES.values(), *(chr(256 + index) for index in range(256 - len(_BYTES)))]
"""GPT-2's stand-ins for bytes: what prints as itself, the others from U+0100 on."""
TOKENS = [*ALPHABET, "<s>", "</s>", "ĠĠ", "ĠĠĠĠ", *(f"[PAD{number}]" for number in range(260, VOCAB))]
MERGES = ["Ġ Ġ", "ĠĠ ĠĠ"]
BOS, EOS, TWO_SPACES = 256, 257, 258
TEMPLATE = "{% for message in messages %}{{ message['role'] + ':' + message['content'] }}{% endfor %}"


def metadata_of(config: Any, architecture: str = "llama") -> dict[str, Any]:
    rope = config.rope_parameters
    own = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
    }
    if architecture == "llama":
        own |= {"rope.dimension_count": config.head_dim, "vocab_size": config.vocab_size}
    if architecture in ("qwen3", "gemma3"):
        own |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if architecture == "gemma3":
        own |= {"attention.sliding_window": config.sliding_window}
    return {f"{architecture}.{key}": value for key, value in own.items()} | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3 if token in ("<s>", "</s>") else 1 for token in TOKENS],
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def tensors_of(model: Any, architecture: str = "llama") -> dict[str, np.ndarray]:
    """A model's by GGUF's names.

    A Llama's rows of queries and keys are in ggml's order, the halves of a head interleaved; Gemma's norms are stored
    with the one that it adds to them.
    """
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names, found = gguf.get_tensor_name_map(known, model.config.num_hidden_layers), {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        stem, _, kind = name.rpartition(".")
        if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
            weight = weight.unflatten(0, (-1, 2, model.config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        if architecture == "gemma3" and stem.endswith("norm"):
            weight = weight + 1
        found[f"{names.get_name(stem)}.{kind}"] = weight.float().numpy()
    return found


def write(
    path: Path,
    model: Any,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    architecture: str = "llama",
    metadata: Mapping[str, Any] = {},
    tensors: Mapping[str, np.ndarray | None] = {},
) -> Path:
    """A GGUF file of a tiny model.

    Args:
        metadata, tensors: instead of what the model has; None: without it.
    """
    writer = gguf.GGUFWriter(path, architecture)
    known = architecture if architecture in ("llama", "qwen2", "qwen3", "gemma3") else "llama"
    for key, value in (metadata_of(model.config, architecture) | dict(metadata)).items():
        if value is None:
            continue
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        kinds.get(type(value), writer.add_array)(key, value)
    for name, values in (tensors_of(model, known) | dict(tensors)).items():
        if values is None:
            continue
        if values.ndim == 1:  # llama.cpp keeps these whole
            writer.add_tensor(name, values.astype(np.float32))
        else:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SIZES = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 128},
    **{
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    },
}
"""Hq 4, Hkv 2, and in Llama and Qwen 2 a head dim of 8."""


def tiny(config: Any) -> Any:
    """A model without gradients; of its norms, too, no two numbers are the same."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def tiny_llama(**changes: Any) -> Any:
    from transformers import LlamaConfig

    return tiny(LlamaConfig(**SIZES, **changes))
