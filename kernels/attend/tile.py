"""The pieces every attention kernel is made of: a tile of tokens goes into a running softmax, which leaves a partial.

A *group* is the queries that read the same tokens: the G of a (sequence, KV head), or one query head that has a
selection of its own. They fill the first rows of a tile of at least 16, the smallest that a tensor core multiplies.
"""

import triton
import triton.language as tl

from .. import pages

PAGE = tl.constexpr(pages.PAGE)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NONE = tl.constexpr(float("-inf"))


@triton.jit
def load_queries(
    query_ptr,
    group,
    QUERIES: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """[QUERY_TILE, D_TILE] of the group; zeros beyond its queries and beyond D."""
    query = tl.arange(0, QUERY_TILE)
    column = tl.arange(0, D_TILE)
    inside = (query < QUERIES)[:, None] & (column < D)[None, :]
    tile = tl.load(query_ptr + (group * QUERIES + query)[:, None] * D + column[None, :], mask=inside, other=0.0)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def load_tokens(base_ptr, token, step, valid, D: tl.constexpr, D_TILE: tl.constexpr, UPCAST: tl.constexpr):
    """[TOKENS, D_TILE] of a cache whose slots are `step` elements apart; zeros where not `valid`, which is not read."""
    column = tl.arange(0, D_TILE)
    inside = valid[:, None] & (column < D)[None, :]
    tile = tl.load(base_ptr + token.to(tl.int64)[:, None] * step + column[None, :], mask=inside, other=0.0)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def empty_softmax(QUERY_TILE: tl.constexpr, DV_TILE: tl.constexpr):
    """`best` the largest logit, `mass` Σ 2^(logit - best), `total` Σ 2^(logit - best) value; logits are base 2."""
    return (
        tl.full([QUERY_TILE], NONE, tl.float32),
        tl.zeros([QUERY_TILE], tl.float32),
        tl.zeros([QUERY_TILE, DV_TILE], tl.float32),
    )


@triton.jit
def absorb(
    best,
    mass,
    total,
    queries,
    key_ptr,
    value_ptr,
    token,
    valid,
    key_step,
    value_step,
    scale,
    cap,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    DV: tl.constexpr,
    DV_TILE: tl.constexpr,
    CAPPED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The running softmax with the tokens `token` [TOKENS] where `valid`.

    `key_ptr` and `value_ptr` are where tokens are counted from: of a sequence or page, or [TOKENS, 1], of each token's.
    Plain: scale = log2(e) scaling. Capped: scale = 2 log2(e) scaling / softcap and cap = log2(e) softcap, since
    tanh(x) = 1 - 2 / (2^(2 log2(e) x) + 1).
    """
    # Both loads stand before the first use of either, so that both are under way at once.
    keys = load_tokens(key_ptr, token, key_step, valid, D, D_TILE, UPCAST)
    values = load_tokens(value_ptr, token, value_step, valid, DV, DV_TILE, UPCAST)
    logits = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
    if CAPPED:
        logits = cap * (1.0 - 2.0 / (tl.exp2(logits) + 1.0))
    logits = tl.where(valid[None, :], logits, NONE)
    risen = tl.maximum(best, tl.max(logits, 1))
    shift = tl.where(risen == NONE, 0.0, risen)  # -inf - -inf is NaN
    weights = tl.exp2(logits - shift[:, None])
    fade = tl.exp2(best - shift)
    mass = mass * fade + tl.sum(weights, 1)
    total = tl.dot(weights.to(values.dtype), values, total * fade[:, None], input_precision="ieee")
    return risen, mass, total


@triton.jit
def store_partial(
    out_ptr,
    lse_ptr,
    slot,
    best,
    mass,
    total,
    QUERIES: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    DV: tl.constexpr,
    DV_TILE: tl.constexpr,
):
    """Slot by slot: out [slots, QUERIES, DV], lse [slots, QUERIES]. Nothing absorbed: zeros, and -inf."""
    query = tl.arange(0, QUERY_TILE)
    column = tl.arange(0, DV_TILE)
    divisor = tl.where(mass == 0, 1.0, mass)
    row = slot.to(tl.int64) * QUERIES + query
    inside = (query < QUERIES)[:, None] & (column < DV)[None, :]
    tl.store(out_ptr + row[:, None] * DV + column[None, :], total / divisor[:, None], mask=inside)
    tl.store(lse_ptr + row, tl.where(mass == 0, NONE, (best + tl.log2(divisor)) * LN2), mask=query < QUERIES)
