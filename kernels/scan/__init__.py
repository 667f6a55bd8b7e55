"""A step of attention in one pass: codes score tokens, the best are read exactly, codewords stand for the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backend import FLOATS, choose
from ..pages import PAGE
from ..pages.table import capacity_of, check_table
from .operands import Budget, Tables, Tokens
from .reference import scan as reference

__all__ = ["MOST_SAMPLED", "Budget", "Tables", "Tokens", "kernel_for", "run", "scan"]


def scan(
    query: Tensor, tokens: Tokens, tables: Tables, budget: Budget, *, bits: int | None = None, select: str = "group",
    residual: bool = True, scaling: float, softcap: float | None = None, sink_logits: Tensor | None = None,
    table: Tensor | None = None, marked: bool = True, backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attend from one query per sequence and head. README.md has the formula.

    Args:
        query: [B, Hkv, G, D].
        bits: of the codes, 2, 4 or 8; None: tokens are scored by reduced keys, which have no codewords.
        select: whose score counts: "group", the mean of the queries' softmaxes; "max", their largest logit; "head",
            each query reads tokens of its own.
        residual: whether codewords stand for tokens that are not read.
        scaling: of q·k, before `softcap`.
        sink_logits: [Hkv · G], one more logit for each query, of a value of zeros.
        table: [B, P] whole numbers, the block table; None: tokens are by sequence.
        marked: whether to tell the tokens that were read.

    Returns:
        [B, Hkv, G, Dv] float32, on a GPU in the query's dtype; and [B, Hkv, G or 1, longest] bool: the tokens that were
        read, None where not `marked`.
    """
    check(query, tokens, tables, budget, table, bits, select, residual)
    kernel = kernel_for(query, tokens, tables, budget, paged=table is not None, backend=backend)
    return run(
        kernel, query, tokens, tables, budget, table=table, bits=bits, select=select, residual=residual,
        scaling=scaling, softcap=softcap, sink_logits=sink_logits, marked=marked,
    )  # fmt: skip


def run(
    kernel: str, query: Tensor, tokens: Tokens, tables: Tables, budget: Budget, *, table: Tensor | None, marked: bool,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`scan` of operands that fit together, with what `kernel_for` says, and every option."""
    if kernel == "triton":
        from . import triton_launch

        return triton_launch.scan(query, tokens, tables, budget, table=table, marked=marked, **options)
    if kernel == "numba":
        from .launch import scan as kernel_of

        out, read = kernel_of(query, tokens, tables, budget, table=table, **options)
    else:
        out, read = reference(query, tokens.ordered(table), tables, budget, **options)
    return out, read if marked else None


def check(
    query: Tensor, tokens: Tokens, tables: Tables, budget: Budget, table: Tensor | None, bits: int | None, select: str,
    residual: bool,
) -> None:  # fmt: skip
    """ValueError unless the operands fit together."""
    batch, heads, _, width = query.shape
    check_table(table, batch, query.device)
    capacity = capacity_of(tokens.key, table)
    expected = (batch, heads, capacity)
    if table is not None:
        expected = (len(tokens.key), heads, PAGE)
    for name, part in tokens.of_tokens().items():
        if part.shape[:3] != expected:
            raise ValueError(f"{name}: received {list(part.shape)}, expected {list(expected)} and one more")
    if tokens.key.shape[3] != width or tables.query_map.shape[:2] != (heads, width):
        raise ValueError(
            f"key, query_map: received {list(tokens.key.shape)} and {list(tables.query_map.shape)} for queries "
            f"{list(query.shape)}"
        )
    if budget.longest > capacity:
        raise ValueError(f"longest: received {budget.longest}, expected at most the capacity {capacity}")
    if select not in SELECTS:
        raise ValueError(f"select: received {select!r}, expected one of {', '.join(SELECTS)}")
    lacking = {tokens.scale is None, tokens.codeword is None, tables.key is None, tables.value is None}
    if lacking != {bits is None}:
        raise ValueError("scale, codeword, tables: expected with bits, and none of them without")
    if bits is None and (residual or tokens.key.dtype == torch.uint8):
        raise ValueError("residual, key: received what takes codewords, expected bits")
    held, rank = tokens.reduced.shape[3], tables.query_map.shape[2]
    if held * 8 // bits != rank if bits else held < rank:
        raise ValueError(f"reduced: received {held} numbers of a token, expected those of {rank} dimensions")


SELECTS = ("group", "max", "head")
MOST_SAMPLED = 4096
"""Tokens of a sample whose scores a program of the kernels for a GPU holds in registers, at most."""
MOST_QUERIES = 16
"""Query heads of a KV head in these, at most."""
REFUSED = {
    "numba": (
        "backend: 'numba' takes float32, bfloat16 or float16, tokens that lie whole rows apart, and a multiple of 4 "
        "dimensions and of 4 bytes of codes: use 'reference'"
    ),
    "triton": (
        "backend: 'triton' takes tokens of one order or pages in one piece, codes in multiples of 4 bytes, at most "
        f"{MOST_QUERIES} queries of a head and a sample of at most {MOST_SAMPLED} tokens: use 'reference'"
    ),
}


def kernel_for(
    query: Tensor, tokens: Tokens, tables: Tables, budget: Budget, *, paged: bool = False, backend: str = "auto"
) -> str:
    """ "triton" or "numba"; "reference" where neither takes these operands.

    Args:
        paged: whether there is a block table.

    Raises:
        ValueError: `backend` names one that does not.
    """
    chosen = choose(backend, query, numba=True)
    if chosen == "triton":
        small = budget.sampled <= MOST_SAMPLED and query.shape[2] <= MOST_QUERIES
        fits = small and query.dtype in FLOATS and tokens.fits_triton(paged)
    else:
        fits = chosen == "reference" or (tokens.fits_numba and tables.query_map.shape[-1] % 4 == 0)
    if not fits and backend != "auto":
        raise ValueError(REFUSED[chosen])
    return chosen if fits else "reference"
