"""The backend for a GPU without one: FlashAttention's own classes in ours, with their kernel replaced by its
definition."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends import flash_attn
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvcal.artifacts import KvcalError
from kvcal.runtime.attention import SoftmaxSpec, causal_attention
from kvcal.runtime.engines.vllm.cuda import CudaBackend, CudaBuilder, CudaImpl

HEADS, KV_HEADS, DIM, PAGE = 4, 2, 64, 64
"""The demo model's."""
SPEC = SoftmaxSpec(DIM**-0.5)
NAME = "model.layers.0.self_attn.attn"
TABLE = torch.tensor([[3, 5, 0], [1, 7, 6], [2, 0, 0]], dtype=torch.int32)


def definition(calls):
    """What FlashAttention's kernel does with the operands that it is given."""

    def attend(*, q, k, v, out, cu_seqlens_q, seqused_k, block_table, **others):
        calls.append(k)
        starts = cu_seqlens_q.tolist()
        for request, length in enumerate(seqused_k.tolist()):
            new = slice(starts[request], starts[request + 1])
            pages = block_table[request, : -(-length // PAGE)].long()
            key, value = (part[pages].flatten(0, 1)[:length].transpose(0, 1).unsqueeze(0) for part in (k, v))
            limits = torch.arange(length - (new.stop - new.start) + 1, length + 1).unsqueeze(0)
            found = causal_attention(q[new].transpose(0, 1).unsqueeze(0), key, value, SPEC, limits)
            out[new] = found[0].transpose(0, 1)

    return attend


class Built:
    """A layer of ours as vLLM builds it, and three sequences."""

    def __init__(self, config):
        generator = torch.Generator().manual_seed(0)
        with set_current_vllm_config(config):
            self.impl = CudaImpl(HEADS, DIM, DIM**-0.5, KV_HEADS, None, None, "auto")
            spec = CudaBackend.customize_spec(
                FullAttentionSpec(block_size=PAGE, num_kv_heads=KV_HEADS, head_size=DIM, dtype=torch.bfloat16)
            )
            self.layer = Attention.__new__(Attention)
            torch.nn.Module.__init__(self.layer)
            self.layer.layer_name, self.layer.impl, self.layer.num_heads = NAME, self.impl, HEADS
            for name in ("q", "k", "v"):
                setattr(self.layer, f"_{name}_scale", torch.ones(1))
            config.compilation_config.static_forward_context[NAME] = self.layer
            self.builder = CudaBuilder(spec, [NAME], config, torch.device("cpu"))
        memory = torch.zeros(8, KV_HEADS, PAGE, spec.state_content_size_bytes, dtype=torch.int8)
        self.kv_cache = memory.view(torch.bfloat16)
        self.tokens = [
            [torch.randn(length, heads, DIM, generator=generator).bfloat16() for heads in (HEADS, KV_HEADS, KV_HEADS)]
            for length in (70, 140, 64)
        ]

    def common(self, parts, prefilling):
        """vLLM's description of a batch, and its queries, keys and values: tokens … to … of sequences."""
        starts = torch.tensor([0, *(stop - start for _, start, stop in parts)], dtype=torch.int32).cumsum(0).int()
        lengths = torch.tensor([stop for _, _, stop in parts], dtype=torch.int32)
        slots = [
            TABLE[at, token // PAGE] * PAGE + token % PAGE for at, begin, end in parts for token in range(begin, end)
        ]
        common = CommonAttentionMetadata(
            query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=lengths, num_reqs=len(parts),
            num_actual_tokens=int(starts[-1]), max_query_len=int(starts.diff().max()), max_seq_len=int(lengths.max()),
            block_table_tensor=TABLE[[at for at, _, _ in parts]], slot_mapping=torch.stack(slots).long(),
            is_prefilling=torch.tensor(prefilling), seq_lens_cpu_upper_bound=lengths,
        )  # fmt: skip
        new = [torch.cat([self.tokens[at][part][start:stop] for at, start, stop in parts]) for part in range(3)]
        return common, new

    def forward(self, metadata, query, key, value):
        output = torch.full_like(query, torch.nan)
        self.impl.do_kv_cache_update(self.layer, key, value, self.kv_cache, None)
        self.impl.forward(self.layer, query, key, value, self.kv_cache, metadata, output)
        return output

    def check(self, output, parts):
        for (at, start, stop), found in zip(parts, output.split([end - begin for _, begin, end in parts]), strict=True):
            query, key, value = (tensor.transpose(0, 1).unsqueeze(0).float() for tensor in self.tokens[at])
            limits = torch.arange(start + 1, stop + 1).unsqueeze(0)
            expected = causal_attention(query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], SPEC, limits)
            torch.testing.assert_close(found.float(), expected[0].transpose(0, 1), rtol=2e-2, atol=2e-2)

    def step(self, parts, prefilling):
        common, new = self.common(parts, prefilling)
        self.check(self.forward(self.builder.build(0, common), *new), parts)


@pytest.fixture
def calls(monkeypatch):
    made: list = []
    monkeypatch.setattr(flash_attn, "_FA4_DENSE_ATTENTION_KERNEL", definition(made))
    monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda **_: 2)
    monkeypatch.setattr("vllm.distributed.get_tensor_model_parallel_rank", lambda: 0)
    return made


@pytest.fixture
def built(prepared, calls):
    demo = prepared["demo"]
    asked = {"method": "quest", "keep": 1.0}  # which reads everything, and keeps boxes
    return Built(
        EngineArgs(
            model=demo["model"], dtype="bfloat16", max_model_len=192, enforce_eager=True,
            additional_config={"kvcal": asked},
        ).create_engine_config()
    )  # fmt: skip


def test_prompts_go_to_flash_attention_and_tokens_that_decode_do_not(built, calls):
    built.step([(0, 0, 69), (1, 0, 40)], [True, True])
    assert len(calls) == 1
    built.step([(0, 69, 70), (1, 40, 138), (2, 0, 63)], [False, True, True])
    assert len(calls) == 2
    built.step([(2, 63, 64), (1, 138, 139)], [True, False])  # a prompt's last token alone, before one that decodes
    assert len(calls) == 3
    built.step([(1, 139, 140)], [False])
    assert len(calls) == 3, "a step of tokens that decode"
    for key in calls:  # as asynchronous copies of 16 bytes want it
        assert all(stride * 2 % 16 == 0 for stride in key.stride()[:3]) and key.stride(3) == 1


def test_a_step_that_is_captured_reads_what_is_changed_in_place(built, calls):
    """And has the shapes of the longest context, whatever it was captured with."""
    built.step([(0, 0, 69), (1, 0, 139)], [True, True])
    common, new = built.common([(0, 0, 1), (1, 0, 1)], [False, False])
    common.block_table_tensor.zero_()
    metadata = built.builder.build_for_cudagraph_capture(common)
    assert metadata.kvcal.decode.longest == 192 and metadata.kvcal.decode.replayed
    parts = [(0, 69, 70), (1, 139, 140)]
    replayed, new = built.common(parts, [False, False])
    common.block_table_tensor.copy_(replayed.block_table_tensor)
    common.seq_lens.copy_(replayed.seq_lens)
    built.check(built.forward(metadata, *new), parts)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("asked", "longest", "support"),
    [
        ({"method": "full"}, 1024, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE),
        ({"method": "spectral"}, 4096, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE),
        ({"method": "quest"}, 1024, AttentionCGSupport.NEVER),
        ({"method": "loki"}, 4096, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE),
        ({"method": "loki", "sample": 3000, "choice": "sampled"}, 4096, AttentionCGSupport.NEVER),
    ],
)
def test_which_methods_graphs_hold(prepared, calls, asked, longest, support):
    demo = prepared["demo"]
    config = EngineArgs(
        model=demo["model"], dtype="bfloat16", max_model_len=longest, enforce_eager=True,
        additional_config={"kvcal": {"artifact": demo["artifact"], **asked}},
    ).create_engine_config()  # fmt: skip
    assert CudaBuilder.get_cudagraph_support(config, None) == support


def test_an_engine_that_does_not_ask_for_kvcal_after_one_that_did(prepared, built):
    assert CudaBackend.get_supported_kernel_block_sizes() == [PAGE]
    spec = FullAttentionSpec(block_size=16, num_kv_heads=KV_HEADS, head_size=DIM, dtype=torch.bfloat16)
    assert CudaBackend.customize_spec(spec).page_size_bytes > spec.page_size_bytes
    other = EngineArgs(model=prepared["demo"]["model"], max_model_len=192, enforce_eager=True).create_engine_config()
    with set_current_vllm_config(other):
        impl = CudaImpl(HEADS, DIM, DIM**-0.5, KV_HEADS, None, None, "auto")
        assert CudaBackend.customize_spec(spec) == spec
        assert CudaBackend.get_supported_kernel_block_sizes() != [PAGE]
    assert impl.layer_of(SimpleNamespace(layer_name=NAME)) is None


def test_layers_that_are_unlike(prepared, built):
    message = "a layer has 1 KV heads of 128 dimensions, others 2 of 64"
    with set_current_vllm_config(built.builder.vllm_config), pytest.raises(KvcalError, match=message):
        CudaImpl(4, 128, 0.1, 1, None, None, "auto")
    with set_current_vllm_config(built.builder.vllm_config), pytest.raises(KvcalError, match="ALiBi"):
        CudaImpl(HEADS, DIM, 0.1, KV_HEADS, [1.0] * HEADS, None, "auto")


def test_rows_of_a_layer_that_is_vllms(built):
    """In pages with room for more: its own keys and values, one after the other, from the beginning."""
    cache = torch.arange(4 * 2 * PAGE * 200).view(4, 2, PAGE, 200)
    rows = built.impl.vllm_rows(cache)
    assert rows.shape == (4, 2, PAGE, 2 * DIM)
    assert torch.equal(rows[3, 1].flatten(), cache[3, 1].flatten()[: PAGE * 2 * DIM])
