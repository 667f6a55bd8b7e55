"""Dense attention of one token by everybody else: what is compared with is the fastest of them.

They read what the caches hold and write nothing: their times have no append in them, ours do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .caches import Copy

PAGE = 16
"""Tokens, of FlashInfer's pages."""
AGREES = 2e-2
"""‖theirs − right‖ / ‖right‖ of bfloat16 results."""

Call = Callable[[], Tensor]
"""Gives Hkv·G·Dv numbers a row, in this order."""


def sdpa(copy: Copy, backend: SDPBackend, grouped: bool) -> Call:
    """
    Args:
        grouped: the queries of a KV head as rows of one product, so that no backend has to know of groups.
    """
    query = (copy.grouped if grouped else copy.query).contiguous()

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, copy.key, copy.value, enable_gqa=not grouped)

    return call


@cache
def flex_attention(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention


def flex(copy: Copy) -> Call:
    run = flex_attention(copy.key.is_cuda)
    return lambda: run(copy.query, copy.key, copy.value, enable_gqa=True)


def flash_attn(copy: Copy, module: str) -> Call:
    """
    Args:
        module: of version 2 or of version 3, whose functions are called alike.
    """
    attend = import_module(module).flash_attn_with_kvcache
    query, key, value = (tensor.transpose(1, 2) for tensor in (copy.query, copy.key, copy.value))
    lengths = torch.full((key.shape[0],), key.shape[1], dtype=torch.int32, device=key.device)

    def call() -> Tensor:
        out = attend(query, key, value, cache_seqlens=lengths)
        return out[0] if isinstance(out, tuple) else out

    return call


def flashinfer(copy: Copy) -> Call:
    library: Any = import_module("flashinfer")
    batch, heads, tokens, dims = copy.key.shape
    queries = copy.query.shape[1]
    pages = tokens // PAGE

    def paged(cache: Tensor) -> Tensor:
        """[B·pages, Hkv, PAGE, D]"""
        return cache.unflatten(2, (pages, PAGE)).transpose(1, 2).flatten(0, 1).contiguous()

    caches = paged(copy.key), paged(copy.value)
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=copy.key.device)
    begins = torch.arange(batch + 1, dtype=torch.int32, device=copy.key.device) * pages
    index = torch.arange(batch * pages, dtype=torch.int32, device=copy.key.device)
    last = torch.full((batch,), PAGE, dtype=torch.int32, device=copy.key.device)
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "HND", use_cuda_graph=True, use_tensor_cores=True, paged_kv_indptr_buffer=begins,
        paged_kv_indices_buffer=index, paged_kv_last_page_len_buffer=last,
    )  # fmt: skip
    wrapper.plan(
        begins, index, last, queries, heads, dims, PAGE, q_data_type=copy.key.dtype, kv_data_type=copy.key.dtype
    )
    query = copy.query.squeeze(2).contiguous()
    return lambda: wrapper.run(query, caches)


BASELINES: dict[str, Callable[[Copy], Call]] = {
    **{
        f"SDPA {name}{', grouped' if grouped else ''}": partial(sdpa, backend=backend, grouped=grouped)
        for name, backend in (
            ("flash", SDPBackend.FLASH_ATTENTION),
            ("cuDNN", SDPBackend.CUDNN_ATTENTION),
            ("efficient", SDPBackend.EFFICIENT_ATTENTION),
        )
        for grouped in (True, False)
    },
    "FlashInfer": flashinfer,
    "flash-attn 3": partial(flash_attn, module="flash_attn_interface"),
    "flash-attn": partial(flash_attn, module="flash_attn"),
}
COMPILED: dict[str, Callable[[Copy], Call]] = {"flex attention": flex}
"""Compiled for every shape, in half a minute."""


def softmax_in_float32(copy: Copy, scaling: float) -> Tensor:
    """[B, Hkv, G, Dv]: what all of them should give, by plain torch, a row and head at a time."""
    out = torch.empty(copy.grouped.shape, dtype=torch.float32, device=copy.key.device)
    for row, (query, key, value) in enumerate(zip(copy.grouped, copy.key, copy.value, strict=True)):
        for head in range(key.shape[0]):
            logits = scaling * query[head].float() @ key[head].float().mT
            out[row, head] = logits.softmax(-1) @ value[head].float()
    return out


def prepare(make: Callable[[Copy], Call], copies: list[Copy], expected: Tensor) -> tuple[list[Call], str | None]:
    """(a call for each copy, or why there is none).

    Args:
        expected: the output for the first copy.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            calls = [make(copies[0])]
            out = calls[0]().double().flatten()
            wanted = expected.double().flatten()
            error = float((out - wanted).norm() / wanted.norm())
            if not error < AGREES:
                return [], f"another result: relative error {error:.2g}"
            return calls + [make(copy) for copy in copies[1:]], None
        except Exception as problem:
            reasons = [f"{type(problem).__name__}: {problem}", *map(reason, said)]
            return [], "; ".join(dict.fromkeys(filter(None, map(first_line, reasons))))


def reason(warning: warnings.WarningMessage) -> str:
    """Where no SDPA backend fits, its error says nothing; warnings do, of the one that was asked for and of others."""
    text = str(warning.message).partition(" (Triggered internally")[0]
    return "" if text.endswith("because:") or "disabled" in text else text


def first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0][:160] if lines else ""
