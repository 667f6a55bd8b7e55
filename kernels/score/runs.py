"""`score_runs`: scores of some tokens only, those of chosen runs and of one more range."""

import math

import torch
from torch import Tensor

from ..backend import check_operand, choose
from .quantize import check_bits, rank_of
from .runs_reference import score_runs as reference

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
CODES = {8: torch.int8, 4: torch.uint8, 2: torch.uint8}


def score_runs(
    query: Tensor,
    codes: Tensor,
    scales: Tensor,
    begin: Tensor,
    end: Tensor,
    *,
    capacity: int,
    scaling: float,
    bits: int,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    bias: Tensor | None = None,
    combine: str = "none",
    softcap: float | None = None,
    out_dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    best: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor | None, Tensor | None]:
    """Logits of every query against the codes of its candidates: scaling · (scale · (query · code) + bias), softcapped.

    The candidates are the tokens of the runs, one run after another, then the slots begin … end - 1. Candidate j is in
    the first run whose end is above j.

    Args:
        query: [B, Hkv, G, r], contiguous along r.
        codes, scales: of 8, 4 or 2 bits, as of `score`.
        begin, end: [B] int32: the range after the runs; it may be empty.
        capacity: M, the candidates that there is room for.
        starts: [B, Hkv, R] int32, contiguous: first slot of each run; None: there are no runs.
        ends: [B, Hkv, R] int32, contiguous, or [B, Hkv, G, R] where each query has runs of its own: tokens of each run
            and those before it.
        bias: [B, Hkv, G] float32. Without a softcap only its differences within a group are added: no choice
            depends on the rest, float16 keeps more digits of small numbers, and `remainder` adds it in float32.
        combine: "none": every query's; "max": the largest of the group's; "both".
        out_dtype: float32 or float16, in which larger magnitudes become the largest.
        out, best: contiguous, written and returned instead of new tensors.

    Returns:
        [B, Hkv, G, M] (None with "max") and [B, Hkv, M] (None with "none"); -inf beyond the candidates.
    """
    batch, heads, group, rank = query.shape
    check_bits(bits)
    if bits not in CODES or codes.dtype != CODES[bits]:
        raise ValueError(f"codes: received {codes.dtype} with {bits} bits, expected {CODES.get(bits, 'fewer bits')}")
    if query.dtype not in FLOATS:
        raise ValueError(f"query: received {query.dtype}, expected float16, bfloat16 or float32")
    if codes.dim() != 4 or codes.shape[:2] != (batch, heads) or rank_of(codes, bits) != rank:
        raise ValueError(f"codes: received {list(codes.shape)}, expected [{batch}, {heads}, S, …] of rank {rank}")
    if query.stride(-1) != 1 or codes.stride(-1) != 1:
        raise ValueError("query, codes: expected the last dimension to be contiguous")
    if combine not in ("none", "max", "both"):
        raise ValueError(f"combine: received {combine!r}, expected 'none', 'max' or 'both'")
    if not (scaling > 0 and math.isfinite(scaling)):
        raise ValueError(f"scaling: received {scaling!r}, expected a positive number")
    check_operand("scales", scales, torch.float16, tuple(codes.shape[:3]), query, contiguous=False)
    check_operand("begin", begin, torch.int32, (batch,), query, contiguous=False)
    check_operand("end", end, torch.int32, (batch,), query, contiguous=False)
    if (starts is None) != (ends is None):
        raise ValueError("starts, ends: received one of them, expected both or none")
    if starts is not None and ends is not None:
        runs = starts.shape[-1]
        each = (group,) if ends.dim() == 4 else ()
        if each and combine != "none":
            raise ValueError(f"combine: received {combine!r}, expected 'none' where each query has runs of its own")
        check_operand("starts", starts, torch.int32, (batch, heads, runs), query)
        check_operand("ends", ends, torch.int32, (batch, heads, *each, runs), query)
    if bias is not None:
        check_operand("bias", bias, torch.float32, (batch, heads, group), query, contiguous=False)
    shapes = {"out": (batch, heads, group, capacity), "best": (batch, heads, capacity)}
    wanted = {"none": ("out",), "max": ("best",), "both": ("out", "best")}[combine]
    results = {"out": out, "best": best}
    for name in wanted:
        if (result := results[name]) is None:
            results[name] = result = torch.empty(shapes[name], dtype=out_dtype, device=query.device)
        check_operand(name, result, out_dtype, shapes[name], query)
    run = reference
    if choose(backend, query) == "triton":
        from .runs_kernel import score_runs as run
    results = {name: result if name in wanted else None for name, result in results.items()}
    run(
        query, codes, scales, starts, ends, begin, end, bias, *results.values(),
        scaling=scaling, bits=bits, softcap=softcap,
    )  # fmt: skip
    return results["out"], results["best"]
