"""The definition of attention against a softmax written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from sequences import TOLERANCES
from torch import Tensor

from kvcal.runtime.attention import (
    QUERY_BLOCK,
    SoftmaxSpec,
    attention,
    attention_mass,
    causal_attention,
    probabilities,
)

KINDS = {
    "plain": SoftmaxSpec(0.3),
    "softcap": SoftmaxSpec(0.3, softcap=1.5),
    "sinks": SoftmaxSpec(0.3, sink_logits=torch.tensor([-2.0, 0.5, 3.0, 1.0, -1.0, 0.0])),
    "both": SoftmaxSpec(0.3, softcap=1.5, sink_logits=torch.tensor([-2.0, 0.5, 3.0, 1.0, -1.0, 0.0])),
}


@pytest.fixture(params=KINDS)
def spec(request: pytest.FixtureRequest) -> SoftmaxSpec:
    return KINDS[request.param]


def draw(tokens: int, total: int, heads: int = 6, kv_heads: int = 2, dtype: torch.dtype = torch.float32):
    """query [2, heads, tokens, 8], key [2, kv_heads, total, 8], value [2, kv_heads, total, 5]."""
    generator = torch.Generator().manual_seed(tokens * 1000 + total)
    shapes = (2, heads, tokens, 8), (2, kv_heads, total, 8), (2, kv_heads, total, 5)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def written_out(query: Tensor, key: Tensor, spec: SoftmaxSpec, visible: Tensor) -> Tensor:
    """[B, Hq, T, S] float64 weights, a query at a time; `visible` [B, T, S]."""
    query, key = query.double(), key.double()
    batch, heads, tokens, _ = query.shape
    weights = torch.zeros(batch, heads, tokens, key.shape[2], dtype=torch.float64)
    for row, head, token in torch.cartesian_prod(*map(torch.arange, (batch, heads, tokens))).tolist():
        seen = visible[row, token].nonzero().flatten()
        scores = (key[row, head * key.shape[1] // heads, seen] @ query[row, head, token]) * spec.scaling
        if spec.softcap is not None:
            scores = spec.softcap * (scores / spec.softcap).tanh()
        exponentials = scores.exp()
        sink = 0.0 if spec.sink_logits is None else math.exp(spec.sink_logits[head])
        weights[row, head, token, seen] = exponentials / (exponentials.sum() + sink)
    return weights


def averaged(weights: Tensor, value: Tensor) -> Tensor:
    return weights @ value.double().repeat_interleave(weights.shape[1] // value.shape[1], 1)


@pytest.mark.parametrize("heads", [(6, 6), (6, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [1, 7])
def test_attention(tokens: int, dtype: torch.dtype, heads: tuple[int, int], spec: SoftmaxSpec) -> None:
    query, key, value = draw(tokens, 11, *heads, dtype=dtype)
    everything = torch.ones(2, tokens, 11, dtype=torch.bool)
    expected = averaged(written_out(query, key, spec, everything), value)
    got = attention(query, key, value, spec)
    assert got.dtype == dtype and got.shape == (2, 6, tokens, 5)
    torch.testing.assert_close(got.double(), expected, **TOLERANCES[dtype])


@pytest.mark.parametrize("tokens", [1, 7])
def test_masks_and_queries_that_see_nothing(tokens: int, spec: SoftmaxSpec) -> None:
    query, key, value = draw(tokens, 11)
    visible = torch.rand(2, tokens, 11, generator=torch.Generator().manual_seed(1)) < 0.4
    visible[0, 0] = False
    expected = averaged(written_out(query, key, spec, visible), value)
    got = attention(query, key, value, spec, visible.unsqueeze(1))
    assert not got[0, :, 0].any()
    torch.testing.assert_close(got.double(), expected, **TOLERANCES[torch.float32])


def test_masks_by_head(spec: SoftmaxSpec) -> None:
    query, key, value = draw(1, 11)
    visible = torch.rand(2, 2, 1, 11, generator=torch.Generator().manual_seed(2)) < 0.5
    visible[1, 1] = False
    weights = torch.cat([written_out(query, key, spec, visible[:, head]) for head in (0, 1)], 1)
    mine = [0, 1, 2, 9, 10, 11]  # of both runs over all heads, those of the KV head whose mask it was
    got = attention(query, key, value, spec, visible)
    torch.testing.assert_close(got.double(), averaged(weights[:, mine], value), **TOLERANCES[torch.float32])
    assert not got[1, 3:].any()


@pytest.mark.parametrize("tokens", [1, 7, 2 * QUERY_BLOCK + 3])
def test_causal(tokens: int, spec: SoftmaxSpec) -> None:
    query, key, value = draw(tokens, tokens, *((6, 2) if tokens < 10 else (6, 1)))
    triangle = torch.ones(tokens, tokens).tril().bool().expand(2, -1, -1)
    weights = whole(query, key, spec, triangle)
    torch.testing.assert_close(
        causal_attention(query, key, value, spec).double(), averaged(weights, value), **TOLERANCES[torch.float32]
    )
    torch.testing.assert_close(
        attention_mass(query, key, spec).double(),
        weights.unflatten(1, (key.shape[1], -1)).sum((2, 3)),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize(("tokens", "total"), [(1, 9), (5, 9), (QUERY_BLOCK + 40, QUERY_BLOCK + 100)])
def test_limits(tokens: int, total: int, spec: SoftmaxSpec) -> None:
    """Rows of their own lengths; the first has padding, whose queries may see nothing at all."""
    query, key, value = draw(tokens, total)
    last = torch.tensor([[total - 2], [total]])
    limits = (last - torch.arange(tokens - 1, -1, -1)).clamp_min(0)
    limits[0, : tokens // 2] = 0
    visible = torch.arange(total) < limits.unsqueeze(-1)
    weights = whole(query, key, spec, visible)
    got = causal_attention(query, key, value, spec, limits)
    torch.testing.assert_close(got.double(), averaged(weights, value), **TOLERANCES[torch.float32])
    assert not got[0, :, : tokens // 2].any()
    mass = attention_mass(query, key, spec, limits)
    expected = weights.unflatten(1, (2, 3)).sum((2, 3))
    torch.testing.assert_close(mass.double(), expected, rtol=1e-4, atol=1e-4)
    if spec.sink_logits is None:
        torch.testing.assert_close(mass.sum(-1), 3.0 * (limits > 0).sum(1, keepdim=True).expand(2, 2))


def test_what_is_beyond_a_limit_is_not_touched(spec: SoftmaxSpec) -> None:
    query, key, value = draw(4, 9)
    limits = torch.tensor([[1, 2, 3, 4], [2, 3, 4, 5]])
    first = causal_attention(query, key, value, spec, limits)
    key[:, :, 5:], value[:, :, 5:] = torch.nan, torch.nan
    torch.testing.assert_close(causal_attention(query, key, value, spec, limits), first)


def test_probabilities(spec: SoftmaxSpec) -> None:
    query, key, _ = draw(7, 11)
    visible = torch.rand(2, 7, 11, generator=torch.Generator().manual_seed(3)) < 0.6
    visible[1, 2] = False
    got = probabilities(query, key, spec, visible.unsqueeze(1))
    assert got.shape == (2, 2, 3, 7, 11) and got.dtype == torch.float32
    expected = written_out(query, key, spec, visible)
    torch.testing.assert_close(got.flatten(1, 2).double(), expected, **TOLERANCES[torch.float32])
    totals = got.sum(-1)
    assert not totals[1, :, :, 2].any()
    if spec.sink_logits is None:
        seen = visible.any(-1)[:, None, None].expand_as(totals)
        torch.testing.assert_close(totals, seen.float())
    else:
        assert (totals < 1).all()


def test_half_precision_keeps_its_dtype(spec: SoftmaxSpec) -> None:
    query, key, value = draw(5, 5, dtype=torch.bfloat16)
    triangle = torch.ones(5, 5).tril().bool().expand(2, -1, -1)
    got = causal_attention(query, key, value, spec)
    assert got.dtype == torch.bfloat16
    expected = averaged(written_out(query, key, spec, triangle), value)
    torch.testing.assert_close(got.double(), expected, **TOLERANCES[torch.bfloat16])


def whole(query: Tensor, key: Tensor, spec: SoftmaxSpec, visible: Tensor) -> Tensor:
    """As `written_out`, all queries at once where one at a time takes too long."""
    if query.shape[2] < 10:
        return written_out(query, key, spec, visible)
    heads = torch.arange(query.shape[1]) * key.shape[1] // query.shape[1]
    scores = query.double() @ key.double()[:, heads].mT * spec.scaling
    if spec.softcap is not None:
        scores = spec.softcap * (scores / spec.softcap).tanh()
    exponentials = scores.exp() * visible.unsqueeze(1)
    sink = 0.0 if spec.sink_logits is None else spec.sink_logits.double().exp().view(-1, 1, 1)
    return exponentials / (exponentials.sum(-1, keepdim=True) + sink).clamp_min(1e-300)
