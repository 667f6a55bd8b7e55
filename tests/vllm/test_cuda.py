"""The backend for a GPU without one: FlashAttention's own classes, with their kernel replaced by its definition."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import flash_attn

from kvcal.runtime.attention import SoftmaxSpec, causal_attention
from kvcal.runtime.engines.vllm.backend import rows_of
from kvcal.runtime.engines.vllm.batch import batch_of
from kvcal.runtime.engines.vllm.cuda import CudaBackend, CudaImpl, without_first
from kvcal.runtime.engines.vllm.layer import Layer
from kvcal.runtime.methods.full import FullPolicy

HEADS, KV_HEADS, DIM, PAGE = 6, 2, 32, 64
SPEC = SoftmaxSpec(DIM**-0.5)


def defined(calls):
    """What `flash_attn_varlen_func` does, of the operands that it is given."""

    def attend(*, q, k, v, out, cu_seqlens_q, seqused_k, block_table, softmax_scale, **others):
        calls.append((k, others))
        starts = cu_seqlens_q.tolist()
        for request, length in enumerate(seqused_k.tolist()):
            new = slice(starts[request], starts[request + 1])
            pages = block_table[request, : -(-length // PAGE)].long()
            key, value = (part[pages].flatten(0, 1)[:length].transpose(0, 1).unsqueeze(0) for part in (k, v))
            limits = torch.arange(length - (new.stop - new.start) + 1, length + 1).unsqueeze(0)
            found = causal_attention(q[new].transpose(0, 1).unsqueeze(0), key, value, SPEC, limits)
            out[new] = found[0].transpose(0, 1)

    return attend


@pytest.fixture
def calls(monkeypatch):
    made: list = []
    monkeypatch.setattr(flash_attn, "_FA4_DENSE_ATTENTION_KERNEL", defined(made))
    monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda **_: 3)
    return made


def common(starts, lengths, table, slots, prefilling):
    starts = torch.tensor(starts, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=torch.tensor(lengths, dtype=torch.int32),
        num_reqs=len(lengths), num_actual_tokens=int(starts[-1]), max_query_len=int((starts[1:] - starts[:-1]).max()),
        max_seq_len=max(lengths), block_table_tensor=table, slot_mapping=slots,
        is_prefilling=torch.tensor(prefilling), seq_lens_cpu_upper_bound=torch.tensor(lengths, dtype=torch.int32),
    )  # fmt: skip


def flash_metadata(batch):
    return flash_attn.FlashAttentionMetadata(
        num_actual_tokens=batch.num_actual_tokens, max_query_len=batch.max_query_len,
        query_start_loc=batch.query_start_loc, max_seq_len=batch.max_seq_len, seq_lens=batch.seq_lens,
        block_table=batch.block_table_tensor, slot_mapping=batch.slot_mapping,
    )  # fmt: skip


def test_prompts_go_to_flash_attention_and_tokens_that_decode_do_not(calls, monkeypatch):
    monkeypatch.setattr("kvcal.runtime.engines.vllm.backend.engine_of", lambda config: None)
    monkeypatch.setattr("kvcal.runtime.engines.vllm.backend.get_current_vllm_config", lambda: None)
    monkeypatch.setattr(flash_attn, "get_current_vllm_config_or_none", lambda: None)
    impl = CudaImpl(HEADS, DIM, DIM**-0.5, KV_HEADS, None, None, "auto")
    ours = Layer.of(FullPolicy(), KV_HEADS, DIM, torch.bfloat16, SPEC)
    layer = SimpleNamespace(
        layer_name="model.layers.0.self_attn.attn",
        **{f"_{name}_scale": torch.ones(1) for name in ("q", "k", "v")},
    )
    impl._layers[layer.layer_name] = ours
    generator = torch.Generator().manual_seed(0)
    lengths = {"query": HEADS, "key": KV_HEADS, "value": KV_HEADS}
    whole = [
        {name: torch.randn(tokens, heads, DIM, generator=generator).bfloat16() for name, heads in lengths.items()}
        for tokens in (70, 90, 64)
    ]
    table = torch.tensor([[3, 5], [1, 7], [2, 0]], dtype=torch.int32)
    kv_cache = torch.zeros(8, KV_HEADS, PAGE, ours.layout.nbytes // PAGE, dtype=torch.int8).view(torch.bfloat16)

    def step(parts, prefilling):
        """The tokens of each sequence from … to …."""
        new = {name: torch.cat([whole[at][name][start:stop] for at, start, stop in parts]) for name in lengths}
        starts = [0]
        for _, start, stop in parts:
            starts.append(starts[-1] + stop - start)
        tables = table[[at for at, _, _ in parts]]
        slots = torch.cat([
            torch.tensor([int(table[at, token // PAGE]) * PAGE + token % PAGE for token in range(start, stop)])
            for at, start, stop in parts
        ])  # fmt: skip
        batch = common(starts, [stop for _, _, stop in parts], tables, slots, prefilling)
        metadata = flash_metadata(batch)
        metadata.kvcal = batch_of(
            starts, batch.seq_lens.tolist(), prefilling, batch.seq_lens, tables, slots
        )  # fmt: skip
        metadata.of_prompts = flash_metadata(without_first(batch, metadata.kvcal.decoding))
        output = torch.full_like(new["query"], torch.nan)
        impl.do_kv_cache_update(layer, new["key"], new["value"], kv_cache, slots)
        impl.forward(layer, new["query"], new["key"], new["value"], kv_cache, metadata, output)
        for (at, start, stop), found in zip(
            parts, output.split([stop - start for _, start, stop in parts]), strict=True
        ):
            query, key, value = (whole[at][name].transpose(0, 1).unsqueeze(0).float() for name in lengths)
            limits = torch.arange(start + 1, stop + 1).unsqueeze(0)
            expected = causal_attention(query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], SPEC, limits)
            torch.testing.assert_close(found.float(), expected[0].transpose(0, 1), rtol=2e-2, atol=2e-2)

    step([(0, 0, 69), (1, 0, 40)], [True, True])
    assert len(calls) == 1
    step([(0, 69, 70), (1, 40, 89), (2, 0, 64)], [False, True, True])
    assert len(calls) == 2
    step([(1, 89, 90)], [False])
    assert len(calls) == 2, "a step of tokens that decode"
    for key, _ in calls:  # by asynchronous copies of 16 bytes
        assert all(stride * 2 % 16 == 0 for stride in key.stride()[:3]) and key.stride(3) == 1


def test_rows_of_a_layer_that_is_vllms():
    """In pages with room for more: its own keys and values, one after the other, from the beginning."""
    cache = torch.arange(4 * 2 * PAGE * 24).view(4, 2, PAGE, 24)
    rows = rows_of(cache, 8)
    assert rows.shape == (4, 2, PAGE, 16)
    assert torch.equal(rows[3, 1].flatten(), cache[3, 1].flatten()[: PAGE * 16])
    assert rows_of(cache, 12) is cache


def test_what_vllm_asks_of_a_backend():
    assert CudaBackend.get_name() == "CUSTOM"
    assert CudaBackend.get_impl_cls() is CudaImpl
