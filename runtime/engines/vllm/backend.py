"""What kvcal's backends have in common, whichever of vLLM's own they are built on: mixed into its classes, they let
layers without a method be vLLM's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheLayout

from ....artifacts import KvcalError
from ...attention import SoftmaxSpec
from .batch import Batch, Dense, batch_of
from .engine import BLOCKS, Engine, engine_of, last_engine
from .layer import Layer


class BackendMixin:
    """Of an `AttentionBackend`."""

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Pages with room for what methods keep, in layers of full attention."""
        engine = last_engine()
        if engine is None or not engine.bytes_per_token or spec.state_content_bytes is not None:
            return spec
        if not isinstance(spec, FullAttentionSpec) and not alike(engine.config):
            return spec
        return replace(spec, state_content_bytes=engine.bytes_per_token)

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[Any]:
        if last_engine() is None:
            return super().get_supported_kernel_block_sizes(kv_cache_spec)  # type: ignore[misc]
        return list(BLOCKS)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Heads first in a page, so that each head's part of it lies by itself."""
        return (KVCacheLayout.LBHNC,)


def alike(config: Any) -> bool:
    """Whether layers with a window have pages as those without have."""
    return bool(config.scheduler_config.disable_hybrid_kv_cache_manager)


class BuilderMixin:
    """Of an `AttentionMetadataBuilder`."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        self.engine = engine_of(vllm_config)
        self.exact = vllm_config.speculative_config is None
        """Whether the host knows how many tokens each request has."""
        self._longest: int | None = None
        if self.engine is not None:
            self._init_reorder_batch_threshold(1)  # type: ignore[attr-defined]
            self.engine.warm_up(device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        engine = engine_of(vllm_config)
        if engine is None:
            return super().get_cudagraph_support(vllm_config, kv_cache_spec)  # type: ignore[misc]
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE if engine.captured else AttentionCGSupport.NEVER

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        if self.engine is not None:
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
        prefilling = [False] * count if common.is_prefilling is None else common.is_prefilling[:count].tolist()
        return batch_of(
            common.query_start_loc_cpu[: count + 1].tolist(), lengths[:count].tolist(), prefilling,
            common.seq_lens[:count], common.block_table_tensor[:count], common.slot_mapping, self._longest, self.exact,
        )  # fmt: skip


class ImplMixin:
    """Of an `AttentionImpl`."""

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
        self.kvcal: Engine | None = None
        if attn_type == AttentionType.DECODER:
            self.kvcal = engine_of(get_current_vllm_config())
        if self.kvcal is not None and alibi_slopes is not None:
            raise KvcalError("ALiBi adds to logits what codes and bases know nothing of: kvcal has no such models")
        self._windowed = sliding_window is not None
        self._spec = SoftmaxSpec(float(scale), logits_soft_cap or None, sinks)
        self._layers: dict[str, Layer | None] = {}

    def of_layer(self, layer: Any) -> Layer | None:
        """None: the layer is vLLM's."""
        name = layer.layer_name
        if name not in self._layers:
            engine, target = self.kvcal, self.kv_sharing_target_layer_name or name  # type: ignore[attr-defined]
            ours = engine is not None and not self._windowed
            self._layers[name] = engine.layer(extract_layer_index(target), self._spec) if ours else None  # type: ignore[union-attr]
        return self._layers[name]

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any,
        output: Tensor, output_scale: Tensor | None = None, output_block_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        ours = self.of_layer(layer)
        if ours is None or attn_metadata is None:
            return super().forward(  # type: ignore[misc]
                layer, query, key, value, rows_of(kv_cache, self.head_size), attn_metadata, output, output_scale,  # type: ignore[attr-defined]
                output_block_scale,
            )  # fmt: skip
        if self.kv_sharing_target_layer_name is not None:  # type: ignore[attr-defined]
            key = value = None  # type: ignore[assignment]
        dense = self.dense(layer, attn_metadata)
        ours.forward(query, key, value, kv_cache.view(torch.uint8).flatten(2), attn_metadata.kvcal, output, dense)
        return output

    def dense(self, layer: Any, attn_metadata: Any) -> Dense | None:
        """See `layer.Layer.forward`."""
        return None

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Nothing in our layers: `forward` writes tokens, with what is kept beside them."""
        if self.of_layer(layer) is None:
            rows = rows_of(kv_cache, self.head_size)  # type: ignore[attr-defined]
            super().do_kv_cache_update(layer, key, value, rows, slot_mapping)  # type: ignore[misc]


def rows_of(kv_cache: Tensor, head_dim: int) -> Tensor:
    """[blocks, Hkv, tokens, 2 D] as vLLM's own backends take it, of pages with room for more at their end."""
    if kv_cache.dim() != 4 or kv_cache.shape[3] == 2 * head_dim:
        return kv_cache
    strides = (*kv_cache.stride()[:2], 2 * head_dim, 1)
    return kv_cache.as_strided((*kv_cache.shape[:3], 2 * head_dim), strides, kv_cache.storage_offset())
