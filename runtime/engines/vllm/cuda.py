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
from .batch import Batch, pick
from .layer import PromptAttention


class CudaBuilder(BuilderMixin, FlashAttentionMetadataBuilder):
    supports_update_block_table = False  # a batch has its own

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if self.ours:
            metadata.of_prompts = None
            if metadata.kvcal.decoding and metadata.kvcal.prompts:
                common = prompts_of(common_attn_metadata, metadata.kvcal)
                metadata.of_prompts = FlashAttentionMetadataBuilder.build(self, 0, common, fast_build)
        return metadata


def prompts_of(common: Any, batch: Batch) -> Any:
    """vLLM's description of a batch without the requests that decode."""
    gone = set(batch.decoding)
    starts, device = common.query_start_loc_cpu.tolist(), common.seq_lens.device
    left = [at for at in range(common.num_reqs) if at not in gone and starts[at + 1] > starts[at]]
    new = [starts[at + 1] - starts[at] for at in left]
    start = common.query_start_loc_cpu.new_tensor([0, *new]).cumsum(0).to(common.query_start_loc_cpu.dtype)
    rows, upper = pick(left, device), common.seq_lens_cpu_upper_bound
    return common.replace(
        query_start_loc=start.to(device),
        query_start_loc_cpu=start,
        seq_lens=common.seq_lens[rows],
        seq_lens_cpu_upper_bound=None if upper is None else upper[left],
        is_prefilling=None,
        num_reqs=len(left),
        num_actual_tokens=sum(new),
        block_table_tensor=common.block_table_tensor[rows],
        slot_mapping=common.slot_mapping[batch.prompted],
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


class CudaImpl(ImplMixin, FlashAttentionImpl):
    def prompt_attention(self, layer: Any, attn_metadata: Any) -> PromptAttention:
        metadata = attn_metadata.of_prompts or attn_metadata

        def attend(query: Tensor, rows: Tensor, output: Tensor) -> None:
            FlashAttentionImpl.forward(self, layer, query, query, query, rows, metadata, output)

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
