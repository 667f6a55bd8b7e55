"""The backend on a CPU. Prompts attend in torch, not in vLLM's kernels, which keep keys transposed for the vector
instructions of the machine, where no other kernel can read them."""

from __future__ import annotations

from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from .backend import BackendMixin, BuilderMixin, ImplMixin


class CpuBuilder(BuilderMixin, CPUAttentionMetadataBuilder):
    pass


class CpuImpl(ImplMixin, CPUAttentionBackendImpl):
    pass


class CpuBackend(BackendMixin, CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[CpuImpl]:
        return CpuImpl

    @staticmethod
    def get_builder_cls() -> type[CpuBuilder]:
        return CpuBuilder
