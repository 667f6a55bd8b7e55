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
TOKENS = [*ALPHABET, "<s>", "</s>", "ĠĠ", *(f"[PAD{number}]" for number in range(259, VOCAB))]
MERGES = ["Ġ Ġ"]
BOS, EOS, TWO_SPACES = 256, 257, 258
TEMPLATE = "{% for message in messages %}{{ message['role'] + ':' + message['content'] }}{% endfor %}"
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def metadata_of(config: Any) -> dict[str, Any]:
    """Of a Llama."""
    return {
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "llama.rope.dimension_count": config.head_dim,
        "llama.vocab_size": config.vocab_size,
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


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    """A Llama's by GGUF's names; rows of queries and keys in ggml's order: the halves of a head interleaved."""
    found = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, stem = stem.split(".", 3)
            own = f"blk.{layer}.{_NAMES[stem]}.weight"
        else:
            own = f"{_NAMES[stem]}.weight"
        if stem in ("self_attn.q_proj", "self_attn.k_proj"):
            weight = weight.unflatten(0, (-1, 2, model.config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        found[own] = weight.float().numpy()
    return found


def write(
    path: Path,
    model: Any,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    architecture: str = "llama",
    metadata: Mapping[str, Any] = {},
    tensors: Mapping[str, np.ndarray | None] = {},
) -> Path:
    """A GGUF file of a tiny Llama. Args: metadata, tensors: instead of what the model has; None: without it."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (metadata_of(model.config) | dict(metadata)).items():
        if value is None:
            continue
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        kinds.get(type(value), writer.add_array)(key, value)
    for name, values in (tensors_of(model) | dict(tensors)).items():
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


def tiny_llama(**changes: Any) -> Any:
    """2 layers, Hq 4, Hkv 2, D 8, context 128; of its norms, too, no two numbers are the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, bos_token_id=BOS, eos_token_id=EOS, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.requires_grad_(False)
