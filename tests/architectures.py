"""Tiny models of each architecture, and what their layers should compute, written out from their projections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

HEAD_DIM = 16
HEADS, KV_HEADS = 4, 2


@dataclass(frozen=True)
class Architecture:
    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    kv_heads: int = KV_HEADS
    split: Callable[..., Any] | None = None
    """Where queries, keys and values come from one projection: its output -> (q, k, v)."""
    projection: str = ""
    interleaved: bool = False
    rotary: bool = True

    def oracle(self, model: Any, forward: Callable[[], Any]) -> list[dict[str, torch.Tensor]]:
        """Per layer, from hooks on projections, norms and the rotary embedding's arguments; no kvcal code."""
        layers = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
        records: list[dict[str, Any]] = [{} for _ in layers]
        handles = []
        for layer, record in zip(layers, records, strict=True):
            handles.append(layer.register_forward_pre_hook(_keep_rotation(record), with_kwargs=True))
            for name, child in layer.named_children():
                handles.append(child.register_forward_hook(_keep_output(record, name)))
        forward()
        for handle in handles:
            handle.remove()
        return [self._from(record) for record in records]

    def _from(self, record: dict[str, Any]) -> dict[str, torch.Tensor]:
        if self.split:
            query, key, value = self.split(record[self.projection])
        else:
            query, key, value = (record[name] for name in ("q_proj", "k_proj", "v_proj"))
            query, key = record.get("q_norm", query), record.get("k_norm", key)
        query, key, value = (_heads(part) for part in (query, key, value))
        out = {"query_pre": query, "key_pre": key, "value": value, "query_post": query, "key_post": key}
        if self.rotary:
            out |= {
                f"{name}_post": rotate(out[f"{name}_pre"], *record["rotation"], self.interleaved)
                for name in ("query", "key")
            }
        return out


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotary embedding as complex numbers: x [B, H, T, D], cos and sin [B, T, R] for the first R dims."""
    dims = cos.shape[-1]
    part, rest = x[..., :dims], x[..., dims:]
    if interleaved:
        number = torch.complex(part[..., 0::2], part[..., 1::2])
        angle = torch.complex(cos[..., 0::2], sin[..., 0::2])
    else:
        number = torch.complex(part[..., : dims // 2], part[..., dims // 2 :])
        angle = torch.complex(cos[..., : dims // 2], sin[..., : dims // 2])
    turned = number * angle.unsqueeze(1)
    if interleaved:
        joined = torch.stack((turned.real, turned.imag), -1).flatten(-2)
    else:
        joined = torch.cat((turned.real, turned.imag), -1)
    return torch.cat((joined, rest), -1)


def _heads(tensor: torch.Tensor) -> torch.Tensor:
    """[B, T, H·D] or [B, T, H, D] or [B, H, T, D] -> [B, H, T, D]; the tests use 21 tokens, never a head count."""
    if tensor.dim() == 3:
        tensor = tensor.unflatten(-1, (-1, HEAD_DIM))
    return tensor if tensor.shape[2] == 21 else tensor.transpose(1, 2)


def _keep_rotation(record: dict[str, Any]) -> Callable[..., None]:
    return lambda module, args, kwargs: record.update(rotation=kwargs.get("position_embeddings"))


def _keep_output(record: dict[str, Any], name: str) -> Callable[..., None]:
    return lambda module, args, output: record.update({name: output})


def _phi3(joint: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return joint.split([HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM], -1)


def _gpt2(joint: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return joint.chunk(3, -1)


def _neox(joint: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Each head's query, key and value lie together."""
    return joint.unflatten(-1, (HEADS, 3, HEAD_DIM)).unbind(3)


ARCHITECTURES = {
    "llama": Architecture("LlamaConfig"),
    "llama-yarn": Architecture(
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral": Architecture("MistralConfig", {"sliding_window": None}),
    "mistral-window": Architecture("MistralConfig", {"sliding_window": 8}),
    "qwen2": Architecture("Qwen2Config"),
    "qwen3": Architecture("Qwen3Config", {"head_dim": HEAD_DIM}),
    "gemma2": Architecture("Gemma2Config", {"head_dim": HEAD_DIM, "query_pre_attn_scalar": 16, "sliding_window": 8}),
    "gemma3": Architecture(
        "Gemma3TextConfig",
        {
            "head_dim": HEAD_DIM,
            "sliding_window": 8,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3": Architecture("Phi3Config", split=_phi3, projection="qkv_proj"),
    "gpt-neox": Architecture("GPTNeoXConfig", kv_heads=HEADS, split=_neox, projection="query_key_value"),
    "olmo2": Architecture("Olmo2Config"),
    "mixtral": Architecture("MixtralConfig", {"num_local_experts": 2}),
    "cohere": Architecture("CohereConfig", interleaved=True),
    "gpt2": Architecture("GPT2Config", kv_heads=HEADS, split=_gpt2, projection="c_attn", rotary=False),
}


def build(
    name: str, attention: str | None = None, seed: int = 0, dtype: torch.dtype = torch.float32, **other: Any
) -> Any:
    """A random three-layer model of an architecture, in eval mode.

    Args:
        other: settings of its config that are to differ.
    """
    architecture = ARCHITECTURES[name]
    settings: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": HEADS * HEAD_DIM,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **architecture.settings,
        **other,
    }
    if name in {"gpt2", "gpt-neox"}:
        del settings["num_key_value_heads"]
    if name == "gpt2":
        del settings["intermediate_size"]
    config = getattr(transformers, architecture.config)(**settings)
    if attention == "sdpa" and name == "gemma2":
        attention = None  # transformers has no SDPA for its soft-capping
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype).eval()
    # Norm weights and biases start at one and zero, where a misplaced one would not show.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model
