"""Pages found through a block table against the same tokens in order; nothing but a sequence's own tokens is read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvcal.runtime.attention import SoftmaxSpec, attention
from kvcal.runtime.kv.pages import PAGE, DecodeMetadata, LayerCache, PagedBuffer, contiguous_metadata
from kvcal.runtime.methods.base import Reading
from kvcal.runtime.methods.full import FullPolicy

LENGTHS = (130, 1, 64, 77)
HEADS, GROUP, D, DV = 2, 3, 16, 8
DIMS = {"key": D, "value": DV}


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows() -> dict[str, list[Tensor]]:
    """[Hkv, tokens, D | Dv] of each sequence."""
    return {
        name: [drawn(HEADS, length, dims, seed=at + dims) for at, length in enumerate(LENGTHS)]
        for name, dims in DIMS.items()
    }


def scattered() -> LayerCache:
    """Pages in random order, those of nobody between them, NaN wherever no token is."""
    wanted = [-(-length // PAGE) for length in LENGTHS]
    order = torch.randperm(sum(wanted) + 5, generator=torch.Generator().manual_seed(0))
    table = torch.zeros(len(LENGTHS), max(wanted), dtype=torch.int64)
    pages = {name: torch.full((len(order), PAGE, HEADS, dims), torch.nan) for name, dims in DIMS.items()}
    first = 0
    for at, (length, count) in enumerate(zip(LENGTHS, wanted, strict=True)):
        table[at, :count] = order[first : first + count]
        first += count
        for token in range(length):
            for name, of in rows().items():
                pages[name][table[at, token // PAGE], token % PAGE] = of[at][:, token]
    seq_lens = torch.tensor(LENGTHS, dtype=torch.int32)
    return LayerCache(pages, {}, {}, DecodeMetadata(table, seq_lens, max(LENGTHS), min(LENGTHS), contiguous=False))


def in_order() -> LayerCache:
    buffers = {}
    for name, of in rows().items():
        buffers[name] = PagedBuffer()
        buffers[name].reserve(max(LENGTHS), torch.zeros(len(LENGTHS), HEADS, 1, DIMS[name]))
        buffers[name].used = max(LENGTHS)
        for at, tokens in enumerate(of):
            buffers[name].tensor[at, :, : tokens.shape[1]] = tokens
    capacity = buffers["key"].tensor.shape[2]
    metadata = contiguous_metadata(LENGTHS, capacity, torch.device("cpu"))
    return LayerCache({name: buffer.pages for name, buffer in buffers.items()}, {}, {}, metadata)


CACHES = pytest.mark.parametrize("cache", [scattered(), in_order()], ids=["scattered", "in order"])


@CACHES
@pytest.mark.parametrize("name", DIMS)
def test_tokens_are_those_of_each_sequence(cache, name):
    found = cache.tokens(name)
    assert found.shape == (len(LENGTHS), HEADS, max(LENGTHS), DIMS[name])
    for at, tokens in enumerate(rows()[name]):
        assert torch.equal(found[at, :, : tokens.shape[1]], tokens)


@CACHES
def test_gathered_tokens_are_those_at_their_positions(cache):
    generator = torch.Generator().manual_seed(3)
    index = torch.stack([torch.randint(0, length, (HEADS, 9), generator=generator) for length in LENGTHS])
    (found,) = cache.gather(("value",), index)
    for at, tokens in enumerate(rows()["value"]):
        for head in range(HEADS):
            assert torch.equal(found[at, head], tokens[head, index[at, head]])


@CACHES
def test_writing_touches_the_last_slot_of_each_sequence_and_nothing_else(cache):
    pages = {name: tensor.clone() for name, tensor in cache.pages.items()}
    twin = LayerCache(pages, {}, {}, cache.metadata)
    new = {name: drawn(len(LENGTHS), HEADS, 1, dims, seed=40 + dims) for name, dims in DIMS.items()}
    twin.write_last(new)
    for name in DIMS:
        for at, length in enumerate(LENGTHS):
            page, offset = cache.metadata.block_table[at, (length - 1) // PAGE], (length - 1) % PAGE
            assert torch.equal(pages[name][page, offset], new[name][at, :, 0])
            pages[name][page, offset] = cache.pages[name][page, offset]
        torch.testing.assert_close(pages[name], cache.pages[name], rtol=0, atol=0, equal_nan=True)


def test_full_attention_through_scattered_pages():
    """What lies beyond a sequence's tokens may be anything that is finite."""
    cache, spec = scattered(), SoftmaxSpec(D**-0.5, softcap=5.0, sink_logits=drawn(HEADS * GROUP, seed=9))
    cache = LayerCache({name: pages.nan_to_num(nan=1e4) for name, pages in cache.pages.items()}, {}, {}, cache.metadata)
    query = drawn(len(LENGTHS), HEADS * GROUP, 1, D, seed=8)
    found = FullPolicy().step(query, cache, spec)
    for at, (key, value) in enumerate(zip(*rows().values(), strict=True)):
        alone = attention(query[at : at + 1].double(), key[None].double(), value[None].double(), spec)
        torch.testing.assert_close(found.output[at : at + 1].double(), alone, rtol=1e-5, atol=1e-6)
    reading = Reading(FullPolicy(), cache.metadata, found.selected, HEADS, {"key": 4 * D, "value": 4 * DV}, 0)
    assert reading.bytes_read() == sum(LENGTHS) * HEADS * (D + DV) * 4
    assert reading.mask().sum((1, 2)).tolist() == [HEADS * length for length in LENGTHS]


def test_a_buffer_keeps_its_tokens_when_it_grows_and_when_sequences_are_chosen():
    buffer, tokens = PagedBuffer(), drawn(3, HEADS, 300, D, seed=1)
    for at in range(0, 300, 50):
        buffer.reserve(at + 50, tokens)
        buffer.used = at + 50
        buffer.tensor[:, :, at : at + 50] = tokens[:, :, at : at + 50]
        assert torch.equal(buffer.view, tokens[:, :, : at + 50])
    buffer.keep(torch.tensor([2, 0, 2]))
    assert torch.equal(buffer.view, tokens[[2, 0, 2]])
    pages = buffer.tensor.shape[2] // PAGE
    assert buffer.pages.shape == (3 * pages, PAGE, HEADS, D)
    assert torch.equal(buffer.pages[pages + 1, 5], tokens[0, :, PAGE + 5])
    assert buffer.pages.data_ptr() == buffer.tensor.data_ptr(), "a view, in which steps write"
    buffer.tensor = buffer.tensor.contiguous()
    with pytest.raises(RuntimeError, match="view"):  # rather than a copy, in which what is written would be lost
        _ = buffer.pages


def test_a_step_reckons_once_for_all_layers():
    metadata, calls = contiguous_metadata((5, 7), 64, torch.device("cpu")), []
    assert metadata is contiguous_metadata((5, 7), 64, torch.device("cpu"))
    for _ in range(2):
        assert metadata.once("test", lambda: calls.append(1) or 11) == 11
    assert calls == [1]
    assert metadata.valid().tolist() == [[True] * 5 + [False] * 2, [True] * 7]
    assert contiguous_metadata((7, 7), 64, torch.device("cpu")).valid() is None
