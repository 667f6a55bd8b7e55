"""What kvcal's backends have in common, whichever of vLLM's own they are built on: mixed into its classes, they let
layers without a method be vLLM's."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheLayout

from ....artifacts import KvcalError
from ....kernels.pages import PAGE
from ...attention import SoftmaxSpec
from .batch import Batch, batch_of
from .engine import Engine, engine_of, last_engine
from .layer import Layer, PromptAttention

LOG = logging.getLogger("vllm.kvcal")
WARM = 4096
"""Tokens of the contexts that kernels are warmed up with, at most, where no graph is captured."""


class BackendMixin:
    """Mixed into an `AttentionBackend` of vLLM."""

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Pages with room for what methods keep, in layers of full attention."""
        engine = last_engine()
        if engine is None or not engine.bytes_per_token or spec.state_content_bytes is not None:
            return super().customize_spec(spec)  # type: ignore[misc]
        if not isinstance(spec, FullAttentionSpec) and not pages_are_alike(engine.config):
            return spec
        return replace(spec, state_content_bytes=engine.bytes_per_token)

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[Any]:
        if last_engine() is None:
            return super().get_supported_kernel_block_sizes(kv_cache_spec)  # type: ignore[misc]
        return [PAGE]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...] | None:
        """Heads first in a page, so that each head's part of it lies by itself."""
        if last_engine() is None:
            return super().supported_kv_cache_layouts()  # type: ignore[misc]
        return (KVCacheLayout.LBHNC,)


def pages_are_alike(config: Any) -> bool:
    """Whether layers with a window are dealt the same pages as those without."""
    return bool(config.scheduler_config.disable_hybrid_kv_cache_manager)


class BuilderMixin:
    """Mixed into an `AttentionMetadataBuilder` of vLLM: what it builds for our layers has a `Batch`, `kvcal`."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        self.engine, self._longest = engine_of(vllm_config), None
        self.lengths_known = vllm_config.speculative_config is None
        self.ours = False
        if self.engine is None:
            return
        LOG.info("kvcal: making its kernels ready, which takes minutes where they are compiled for the first time")
        longest = self.engine.longest if self.engine.captured else min(self.engine.longest, WARM)
        for attention in get_layers_from_vllm_config(vllm_config, Attention, layer_names).values():
            layer = attention.impl.layer_of(attention)
            if layer is not None:
                self.ours = True
                layer.warm_up(attention.num_heads, longest, device)
        if self.ours:
            self._init_reorder_batch_threshold(1)  # type: ignore[attr-defined]

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        engine = engine_of(vllm_config)
        if engine is None:
            return super().get_cudagraph_support(vllm_config, kv_cache_spec)  # type: ignore[misc]
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE if engine.captured else AttentionCGSupport.NEVER

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        if self.ours:
            metadata.kvcal = self.batch(common_attn_metadata)
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        """A graph is replayed as requests grow: its shapes are those of the longest that there may be."""
        self._longest = self.vllm_config.model_config.max_model_len  # type: ignore[attr-defined]
        try:
            return super().build_for_cudagraph_capture(common_attn_metadata)  # type: ignore[misc]
        finally:
            self._longest = None

    def batch(self, common: Any) -> Batch:
        count = common.num_reqs
        lengths = common.seq_lens if common.seq_lens_cpu_upper_bound is None else common.seq_lens_cpu_upper_bound
        prefilling = [] if common.is_prefilling is None else common.is_prefilling.tolist()
        return batch_of(
            common.query_start_loc_cpu[: count + 1].tolist(), lengths[:count].tolist(), prefilling,
            common.seq_lens[:count], common.block_table_tensor[:count], common.slot_mapping, self._longest,
            self.lengths_known,
        )  # fmt: skip


class ImplMixin:
    """Mixed into an `AttentionImpl` of vLLM."""

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, alibi_slopes: Any,
        sliding_window: int | None, kv_cache_dtype: str, logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER, kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None, **more: Any,
    ):  # fmt: skip
        super().__init__(
            num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype, logits_soft_cap,
            attn_type, kv_sharing_target_layer_name, sinks, **more,
        )  # type: ignore[call-arg]  # fmt: skip
        self.engine: Engine | None = engine_of(get_current_vllm_config())
        self.full = attn_type == AttentionType.DECODER and sliding_window is None
        self.spec = SoftmaxSpec(float(scale), logits_soft_cap or None, sinks)
        self._layers: dict[str, Layer | None] = {}
        if self.engine is None or not self.full:
            return
        if alibi_slopes is not None:
            raise KvcalError("ALiBi adds to logits what codes and bases know nothing of: kvcal has no such models")
        if (num_kv_heads, head_size) != (self.engine.heads, self.engine.head_dim):
            raise KvcalError(
                f"a layer has {num_kv_heads} KV heads of {head_size} dimensions, others {self.engine.heads} of "
                f"{self.engine.head_dim}: kvcal's pages are alike in all layers"
            )

    def layer_of(self, layer: Any) -> Layer | None:
        """What attends in a layer of vLLM's; None: vLLM itself."""
        name = layer.layer_name
        if name not in self._layers:
            ours = self.engine is not None and self.full
            self._layers[name] = self.engine.layer(extract_layer_index(name), self.spec) if ours else None  # type: ignore[union-attr]
        return self._layers[name]

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any,
        output: Tensor, output_scale: Tensor | None = None, output_block_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        ours = self.layer_of(layer)
        if ours is None or attn_metadata is None:
            return super().forward(  # type: ignore[misc]
                layer, query, key, value, self.vllm_rows(kv_cache), attn_metadata, output, output_scale,
                output_block_scale,
            )  # fmt: skip
        pieces, attention = kv_cache.view(torch.uint8).flatten(2), self.prompt_attention(layer, attn_metadata)
        ours.forward(query, key, value, pieces, attn_metadata.kvcal, output, attention)
        return output

    def prompt_attention(self, layer: Any, attn_metadata: Any) -> PromptAttention | None:
        """vLLM's own, for the prompts of a batch; None: it has none that can read our pages."""
        return None

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Nothing in our layers: `forward` writes tokens, with what is kept beside them."""
        if self.layer_of(layer) is None:
            super().do_kv_cache_update(layer, key, value, self.vllm_rows(kv_cache), slot_mapping)  # type: ignore[misc]

    def vllm_rows(self, kv_cache: Tensor) -> Tensor:
        """[blocks, Hkv, tokens, 2 D] as vLLM's own backends take it, of pages that may have room for more."""
        head_dim = self.head_size  # type: ignore[attr-defined]
        if self.engine is None or kv_cache.dim() != 4 or kv_cache.shape[3] == 2 * head_dim:
            return kv_cache
        strides = (*kv_cache.stride()[:2], 2 * head_dim, 1)
        return kv_cache.as_strided((*kv_cache.shape[:3], 2 * head_dim), strides, kv_cache.storage_offset())
