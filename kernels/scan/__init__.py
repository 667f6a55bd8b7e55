"""A step of attention in one pass: codes score tokens, the best are read exactly, codewords stand for the others."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import choose
from .operands import Budget, Tables, Tokens
from .reference import scan as reference

__all__ = ["Budget", "Tables", "Tokens", "fits", "scan"]


def scan(
    query: Tensor, tokens: Tokens, tables: Tables, budget: Budget, *, bits: int | None = None, select: str = "group",
    residual: bool = True, scaling: float, softcap: float | None = None, sink_logits: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend from one query per sequence and head. README.md has the formula.

    Args:
        query: [B, Hkv, G, D].
        bits: of the codes, 2, 4 or 8; None: tokens are scored by reduced keys, which have no codewords.
        select: whose score counts: "group", the mean of the queries' softmaxes; "max", their largest logit; "head",
            each query reads tokens of its own.
        residual: whether codewords stand for tokens that are not read.
        scaling: of q·k, before `softcap`.
        sink_logits: [Hkv · G], one more logit for each query, of a value of zeros.

    Returns:
        [B, Hkv, G, Dv] float32, and [B, Hkv, G or 1, longest] bool: the tokens that were read.
    """
    check(query, tokens, tables, budget, bits, select, residual)
    run = reference
    if choose(backend, query, triton=False, numba=True) == "numba":
        if not fits(tokens, tables):
            raise ValueError(REFUSED)
        from .launch import scan as run
    return run(
        query, tokens, tables, budget, bits=bits, select=select, residual=residual, scaling=scaling, softcap=softcap,
        sink_logits=sink_logits,
    )  # fmt: skip


def check(
    query: Tensor, tokens: Tokens, tables: Tables, budget: Budget, bits: int | None, select: str, residual: bool
) -> None:
    """ValueError unless the operands fit together."""
    batch, heads, _, width = query.shape
    expected = (batch, heads, tokens.key.shape[2])
    for name, part in vars(tokens).items():
        if isinstance(part, Tensor) and not name.startswith("correction") and part.shape[:3] != expected:
            raise ValueError(f"{name}: received {list(part.shape)}, expected {list(expected)} and one more")
    if tokens.key.shape[3] != width or tables.query_map.shape[:2] != (heads, width):
        raise ValueError(
            f"key, query_map: received {list(tokens.key.shape)} and {list(tables.query_map.shape)} for queries "
            f"{list(query.shape)}"
        )
    if budget.longest > tokens.key.shape[2]:
        raise ValueError(f"longest: received {budget.longest}, expected at most the capacity {tokens.key.shape[2]}")
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
REFUSED = (
    "backend: 'numba' takes float32, bfloat16 or float16 with heads first in memory, and a multiple of 4 dimensions "
    "and of 4 bytes of codes: use 'reference'"
)


def fits(tokens: Tokens, tables: Tables) -> bool:
    """Whether the kernel in numba takes these operands."""
    return tokens.fits_numba and tables.query_map.shape[-1] % 4 == 0
