"""The definition of `scan` in plain torch: every token's exact logit, of which those of unread tokens are not used."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..codes import decode
from ..pages import PAGE
from .operands import OUTWEIGHS, Budget, Tables, Tokens


def scan(
    query: Tensor, tokens: Tokens, tables: Tables, budget: Budget, *, bits: int | None, select: str, residual: bool,
    scaling: float, softcap: float | None, sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `kvcal.kernels.scan.scan`."""
    longest, query = budget.longest, query if query.dtype == torch.float64 else query.float()
    held = {name: part[:, :, :longest] for name, part in vars(tokens).items() if isinstance(part, Tensor)}
    words = held["codeword"].squeeze(-1).long() if "codeword" in held else None

    def logits(dots: Tensor) -> Tensor:
        dots = dots * scaling
        return dots if softcap is None else softcap * torch.tanh(dots / softcap)

    key, value = rows(tokens, held, tables, words, query.dtype)
    exact = logits(query @ key.mT)
    estimated = logits(estimate(query, held, tables, words, bits))
    position = torch.arange(longest, device=query.device)
    present = position < budget.lengths.view(-1, 1, 1, 1)
    candidate = (position >= budget.first.view(-1, 1, 1, 1)) & (position < budget.begin.view(-1, 1, 1, 1))
    candidates = estimated.masked_fill(~candidate, -torch.inf)
    read = (present & ~candidate) | (candidate & reached(candidates, budget, select))
    weighed = exact.where(read, estimated if residual else torch.full_like(estimated, -torch.inf))
    weighed = weighed.masked_fill(~present, -torch.inf)
    if sink_logits is not None:
        sink = sink_logits.to(weighed).view(1, *weighed.shape[1:3], 1).expand(*weighed.shape[:3], 1)
        weights = torch.cat((weighed, sink), -1).softmax(-1)[..., :-1]
    else:
        weights = weighed.softmax(-1).nan_to_num(0)
    out = weights.where(read, 0) @ value
    if residual:
        assert words is not None and tables.value is not None
        others = weights.where(~read, 0)
        stand_in = of_words(tables.value.to(query), words)
        out = out + others @ (stand_in + corrections(tokens, budget, stand_in))
    return out.to(torch.promote_types(query.dtype, torch.float32)), read


def rows(
    tokens: Tokens, held: dict[str, Tensor], tables: Tables, words: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(keys [B, Hkv, longest, D], values)"""
    if tokens.key.dtype != torch.uint8:
        return held["key"].to(dtype), held["value"].to(dtype)
    assert words is not None
    found = []
    for name, table, turn in (("key", tables.key, tables.turn_key), ("value", tables.value, tables.turn_value)):
        assert table is not None and turn is not None
        difference = decode(held[name], held[f"{name}_scale"].squeeze(-1), 8).to(dtype) @ turn.to(dtype)
        found.append(difference + of_words(table.to(dtype), words))
    return found[0], found[1]


def of_words(table: Tensor, words: Tensor) -> Tensor:
    """[B, Hkv, S, n]: rows of a table [Hkv, C, n] by numbers [B, Hkv, S]."""
    return table[torch.arange(len(table), device=table.device).unsqueeze(1), words]


def estimate(query: Tensor, held: dict[str, Tensor], tables: Tables, words: Tensor | None, bits: int | None) -> Tensor:
    """[B, Hkv, G, longest]: q·k by what tokens are scored by."""
    projected = query @ tables.query_map.to(query)
    if bits is None:
        return projected @ held["reduced"][..., : projected.shape[-1]].to(query).mT
    assert words is not None and tables.key is not None
    dots = projected @ decode(held["reduced"], held["scale"].squeeze(-1), bits).to(query).mT
    by_word = query @ tables.key.to(query).mT
    return dots + by_word.gather(-1, words.unsqueeze(2).expand_as(dots))


def reached(estimated: Tensor, budget: Budget, select: str) -> Tensor:
    """[B, Hkv, G or 1, longest] bool: candidates whose score reaches the threshold.

    Args:
        estimated: [B, Hkv, G, longest], -inf at tokens that are no candidates.
    """
    found = []
    for sequence, logits in enumerate(estimated):
        stride, rank = int(budget.stride[sequence]), int(budget.rank[sequence])
        mass = logits[..., ::stride].logsumexp(-1, keepdim=True).nan_to_num(0, neginf=0)
        if select == "group":  # the mean of softmaxes, each over its head's sample
            scores = (logits - mass).logsumexp(1, keepdim=True)
        else:
            scores = logits.amax(1, keepdim=True) if select == "max" else logits
        sample = scores[..., ::stride].sort(-1, descending=True).values
        enough = int((sample[0, 0] > -torch.inf).sum())
        threshold = torch.full_like(sample[..., :1], torch.inf if rank == 0 else -torch.inf)
        if 0 < rank <= enough:
            threshold = sample[..., rank - 1 : rank]
        heavy = logits - mass > math.log(OUTWEIGHS)
        heavy = heavy if select == "head" else heavy.any(1, keepdim=True)
        found.append((scores >= threshold) | heavy)
    return torch.stack(found)


def corrections(tokens: Tokens, budget: Budget, like: Tensor) -> Tensor:
    """[B, Hkv, longest, Dv]: what is added to a codeword's value, 0 in pages that are not full."""
    if tokens.correction is None or tokens.correction_scale is None:
        return torch.zeros_like(like)
    mean = decode(tokens.correction, tokens.correction_scale.squeeze(-1), 8).to(like)
    full = torch.arange(mean.shape[2], device=like.device) < (budget.lengths // PAGE).unsqueeze(1)
    mean = mean.where(full[:, None, :, None], 0)
    return mean.repeat_interleave(PAGE, 2)[:, :, : like.shape[2]]
