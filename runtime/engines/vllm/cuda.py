"""The backend on an NVIDIA GPU. Prompts attend in FlashAttention, which finds keys and values in our pages as in its
own; where they are kept in 8 bits they are decoded and attend in torch. Nothing here has run on a GPU yet."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from .backend import BackendMixin, BuilderMixin, ImplMixin
from .batch import Dense


class CudaBuilder(BuilderMixin, FlashAttentionMetadataBuilder):
    supports_update_block_table = False  # what a batch is made of its table

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if self.engine is not None and metadata.kvcal.prompts:
            metadata.of_prompts = metadata
            if metadata.kvcal.decoding:
                prompts = without_first(common_attn_metadata, metadata.kvcal.decoding)
                metadata.of_prompts = FlashAttentionMetadataBuilder.build(self, 0, prompts, fast_build)
        return metadata


def without_first(common: Any, count: int) -> Any:
    """A batch without its first requests, so many, each of one token."""
    bound = common.seq_lens_cpu_upper_bound
    return common.replace(
        query_start_loc=common.query_start_loc[count:] - count,
        query_start_loc_cpu=common.query_start_loc_cpu[count:] - count,
        seq_lens=common.seq_lens[count:],
        seq_lens_cpu_upper_bound=None if bound is None else bound[count:],
        is_prefilling=None if common.is_prefilling is None else common.is_prefilling[count:],
        num_reqs=common.num_reqs - count,
        num_actual_tokens=common.num_actual_tokens - count,
        block_table_tensor=common.block_table_tensor[count:],
        slot_mapping=common.slot_mapping[count:],
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


class CudaImpl(ImplMixin, FlashAttentionImpl):
    def dense(self, layer: Any, attn_metadata: Any) -> Dense | None:
        if not attn_metadata.kvcal.prompts:
            return None

        def attend(query: Tensor, rows: Tensor, output: Tensor) -> None:
            FlashAttentionImpl.forward(self, layer, query, query, query, rows, attn_metadata.of_prompts, output)

        return attend


class CudaBackend(BackendMixin, FlashAttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[CudaImpl]:
        return CudaImpl

    @staticmethod
    def get_builder_cls() -> type[CudaBuilder]:
        return CudaBuilder
