"""Split-KV attention over contiguous runs: as `triton_kernel`, with the index found in the runs' cumulative sizes."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..backend import device_of
from .launch import SMALLEST, STAGES, WARPS, by_query, empty_partial, logit_scales, tiles
from .merge_kernel import merge
from .plan import even_part
from .shapes import Partial, choose_splits
from .tile import absorb, empty_softmax, load_queries, store_partial

RUN_TILE = 32
"""Runs compared with a tile's ranks at once: 16 comparisons a thread."""
SIZES_TILE = 256
"""Sizes added up at once, before anything is read: most calls have no more runs."""


@triton.jit
def token_of_rank(starts_ptr, sizes_ptr, runs, rank, RUN_TILE: tl.constexpr):
    """[TOKENS]: the slot of each rank, counted through the runs one after another."""
    token = rank
    before = tl.full([], 0, tl.int32)
    for first in range(0, runs, RUN_TILE):
        run = first + tl.arange(0, RUN_TILE)
        start = tl.load(starts_ptr + run, mask=run < runs, other=0)
        size = tl.maximum(tl.load(sizes_ptr + run, mask=run < runs, other=0), 0)
        end = before + tl.cumsum(size, 0)
        inside = (rank[:, None] >= (end - size)[None, :]) & (rank[:, None] < end[None, :])
        token += tl.sum(tl.where(inside, (start - end + size)[None, :], 0), 1)
        before += tl.sum(size, 0)
    return token


@triton.jit(do_not_specialize=["heads", "runs", "splits"])
def runs_kernel(
    out_ptr,
    lse_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    starts_ptr,
    sizes_ptr,
    count_ptr,
    scale,
    cap,
    heads,
    runs,
    splits,
    key_row: tl.int64,
    key_head: tl.int64,
    key_step: tl.int64,
    value_row: tl.int64,
    value_head: tl.int64,
    value_step: tl.int64,
    COUNTED: tl.constexpr,
    SHARING: tl.constexpr,
    RUN_TILE: tl.constexpr,
    SIZES_TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    TOKEN_TILE: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    DV: tl.constexpr,
    DV_TILE: tl.constexpr,
    CAPPED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program: a part of the tokens of one group's runs, wherever that part begins and ends in them."""
    slot = tl.program_id(0)  # on one axis: the others end at 65535
    part, group = slot % splits, slot // splits
    row, head = group // SHARING // heads, group // SHARING % heads
    key_ptr += row * key_row + head * key_head
    value_ptr += row * value_row + head * value_head
    starts_ptr += group.to(tl.int64) * runs
    sizes_ptr += group.to(tl.int64) * runs
    if COUNTED:
        runs = tl.minimum(tl.load(count_ptr + group), runs)
    tokens = tl.full([], 0, tl.int32)
    for first in range(0, runs, SIZES_TILE):
        run = first + tl.arange(0, SIZES_TILE)
        tokens += tl.sum(tl.maximum(tl.load(sizes_ptr + run, mask=run < runs, other=0), 0), 0)
    begin, end = even_part(tokens, part, splits, TOKEN_TILE)
    queries = load_queries(query_ptr, group, QUERIES, QUERY_TILE, D, D_TILE, UPCAST)
    best, mass, total = empty_softmax(QUERY_TILE, DV_TILE)
    for first in range(begin, end, TOKEN_TILE):
        rank = first + tl.arange(0, TOKEN_TILE)
        token = token_of_rank(starts_ptr, sizes_ptr, runs, rank, RUN_TILE)
        best, mass, total = absorb(
            best, mass, total, queries, key_ptr, value_ptr, token, rank < end, None, key_step, value_step, scale, cap,
            D, D_TILE, DV, DV_TILE, CAPPED, UPCAST,
        )  # fmt: skip
    store_partial(out_ptr, lse_ptr, slot, best, mass, total, QUERIES, QUERY_TILE, DV, DV_TILE)


def attend_runs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    sizes: Tensor,
    count: Tensor | None,
    *,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    extra: Sequence[Partial],
    most: int,
    splits: int | None,
    out: Tensor | None,
) -> Tensor:
    groups = starts.shape[:-1].numel()
    splits = splits or choose_splits(groups, most, SMALLEST, query.device)
    partial = empty_partial(query, value.shape[-1], groups, splits)
    with device_of(query):
        runs_kernel[(groups * splits,)](
            *partial,
            query.contiguous(),
            key,
            value,
            starts.contiguous(),
            sizes.contiguous(),
            starts if count is None else count.contiguous(),
            *logit_scales(scaling, softcap),
            key.shape[1],
            starts.shape[-1],
            splits,
            *key.stride()[:3],
            *value.stride()[:3],
            SHARING=groups // (key.shape[0] * key.shape[1]),
            COUNTED=count is not None,
            RUN_TILE=RUN_TILE,
            SIZES_TILE=SIZES_TILE,
            CAPPED=softcap is not None,
            **tiles(query, value, partial[1].shape[-1]),
            num_warps=WARPS,
            num_stages=STAGES,
        )
    return merge(None, [by_query(query, partial), *extra], sinks, query, value.shape[-1], out)
