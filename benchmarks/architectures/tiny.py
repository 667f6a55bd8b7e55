"""Tiny random models of every decoder that transformers has a configuration for."""

from __future__ import annotations

from typing import Any

import torch

from .overrides import MIXED

VOCAB = 96
_SIZES = {
    64: (
        "hidden_size n_embd d_model n_embed emb_dim dim_model_base embedding_dim embedding_size "
        "attention_hidden_size word_embed_proj_dim backbone_hidden_size mamba_d_ssm lru_width "
        "original_max_position_embeddings index_topk"
    ),
    96: (
        "vocab_size vocab_size_per_layer_input intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim "
        "n_inner dff dim_ff d_inner ffn_hidden_size intermediate_size_mlp dense_intermediate_size "
        "feed_forward_size"
    ),
    32: (
        "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
        "shared_intermediate_size shared_experts_intermediate_size moe_shared_expert_intermediate_size "
        "q_lora_rank swa_q_lora_rank mamba_d_head"
    ),
    16: (
        "head_dim attention_head_dim d_head dim_head kv_channels attention_head_size swa_head_dim "
        "kv_lora_rank swa_kv_lora_rank qk_nope_head_dim swa_qk_nope_head_dim v_head_dim swa_v_head_dim "
        "o_lora_rank index_head_dim router_hidden_size mamba_head_dim linear_key_head_dim "
        "linear_value_head_dim linear_head_dim hidden_size_per_layer_input attention_chunk_size"
    ),
    8: (
        "qk_rope_head_dim rotary_dim sliding_window sliding_window_size window_size attention_window_size "
        "chunk_size mamba_chunk_size mamba_d_state state_size ssm_state_size laurel_rank adapter_rank "
        "num_centroids"
    ),
    4: (
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
        "num_encoder_layers num_blocks num_attention_heads n_head n_heads num_heads decoder_attention_heads "
        "encoder_attention_heads attention_heads num_decoder_attention_heads num_encoder_attention_heads "
        "swa_num_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts mamba_n_heads "
        "mamba_num_heads linear_num_value_heads linear_num_heads"
    ),
    2: (
        "num_key_value_heads num_kv_heads swa_num_key_value_heads index_n_heads num_experts_per_tok "
        "num_experts_per_token moe_topk moe_k zero_expert_num mamba_expand n_mamba_heads linear_num_key_heads "
        "altup_num_inputs num_kv_shared_layers"
    ),
    1: "n_group topk_group num_expert_group first_k_dense_replace num_dense_layers n_groups mamba_n_groups",
    128: "max_position_embeddings n_positions n_ctx context_length rel_extent model_max_length",
}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 1, "cls_token_id": 1, "eos_token_id": 2}
TINY: dict[str, Any] = {name: size for size, names in _SIZES.items() for name in names.split()} | _TOKENS
TINY |= {"sep_token_id": 2, "is_decoder": True}
"""By the names that configurations use; each takes those that it has."""


def settings(config: Any, table: dict[str, Any]) -> dict[str, Any]:
    """The entries of a table that a configuration has."""
    own = {name: value for name, value in table.items() if name in config.to_dict()}
    if "kv_lora_rank" in own:  # latent attention: as many key as query heads, of the sum of two sizes
        own |= {"num_key_value_heads": own["num_attention_heads"]} if "num_key_value_heads" in own else {}
        own.pop("head_dim", None)
    return own


def tiny(model_type: str, overrides: dict[str, Any]) -> Any:
    """Its smallest sensible configuration, where it has a choice with a layer of full attention."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    config = kind(**_merged(_settings_of(kind), overrides))
    text = config.get_text_config()
    if has_full_attention(config):
        return config
    part = overrides if text is config else overrides.get("text_config", {})
    choices = [{"sliding_window": None}]
    if set(getattr(text, "layer_types", None) or [None]) <= {*MIXED, "chunked_attention"}:
        choices.insert(0, {"layer_types": MIXED})
    for choice in choices:
        if part.keys() & choice.keys():
            continue
        more = choice if text is config else {"text_config": choice}
        try:
            other = kind(**_merged(_merged(_settings_of(kind), overrides), more))
        except Exception:
            continue
        if has_full_attention(other):
            return other
    return config


def has_full_attention(config: Any) -> bool:
    from transformers.cache_utils import DynamicCache, DynamicLayer

    try:
        return any(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
    except Exception:
        return False


def _settings_of(kind: Any) -> dict[str, Any]:
    try:
        default = kind()
    except Exception:
        return {name: {} for name in getattr(kind, "sub_configs", None) or {}}
    own = settings(default, TINY)
    for name in getattr(kind, "sub_configs", None) or {}:
        inner = getattr(default, name, None)
        if hasattr(inner, "to_dict"):
            own[name] = settings(inner, TINY) | ({"model_type": inner.model_type} if inner.model_type else {})
    return own


def _merged(own: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    joined = dict(own)
    for name, value in more.items():
        before = joined.get(name)
        joined[name] = _merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return joined


def build(model_type: str, overrides: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny(model_type, overrides)).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
            elif parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    return model.requires_grad_(False)
