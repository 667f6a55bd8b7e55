"""`spectral` written down from its formula, for one sequence, token by token and head by head, in float64.

What is coded (codewords, codes, 8-bit rows) is taken from the policy, as a kernel would find it; that it is right is
tested where it is made. Everything else is here: what is read, and what stands for the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcal.kernels.codes import decode
from kvcal.runtime.attention import SoftmaxSpec
from kvcal.runtime.methods.spectral import SpectralPolicy

PAGE = 64


@dataclass
class Sequence:
    """One sequence's tensors of one layer, float64."""

    key: Tensor
    """[Hkv, n, D]"""
    value: Tensor
    word: Tensor
    """[Hkv, n] int64"""
    left: Tensor
    """[Hkv, n, r]: what codes stand for."""

    @classmethod
    def of(cls, policy: SpectralPolicy, key: Tensor, value: Tensor) -> Sequence:
        kept = {name: tensor[0] for name, tensor in policy.encode(key[None], value[None]).items()}
        words = kept["codeword"].squeeze(-1).long()
        left = decode(kept["code"], kept["scale"].squeeze(-1), policy.settings.bits).double()
        rows = {"key": key.double(), "value": value.double()}
        if policy.settings.rows == 8:
            of = policy.codewords.on(torch.device("cpu"))
            for name in rows:
                turned = decode(kept[name], kept[f"{name}_scale"].squeeze(-1), 8).double()
                own = torch.stack([of[name][head, word] for head, word in enumerate(words)]).double()
                rows[name] = turned @ of[f"turn_{name}"].double() + own
        return cls(rows["key"], rows["value"], words, left)


def step(policy: SpectralPolicy, row: Sequence, query: Tensor, spec: SoftmaxSpec) -> tuple[Tensor, list[set[int]]]:
    """(output [Hq, Dv], the tokens that each query head read) of query [Hq, D] of the last token; the choice exact."""
    of = {name: tensor.double() for name, tensor in policy.codewords.on(torch.device("cpu")).items()}
    settings, (heads, tokens, _) = policy.settings, row.key.shape
    group = query.shape[0] // heads
    budget = tokens if tokens < settings.dense_below else count(settings.keep, tokens)
    sinks = min(settings.sinks, tokens)
    recent = max(1, min(settings.recent, budget // 2 - sinks))
    begin = max(sinks, tokens - recent)
    room = begin - sinks if budget == tokens else max(0, budget - sinks - (tokens - begin))
    out, read = torch.zeros(query.shape[0], row.value.shape[-1], dtype=torch.float64), []
    for head in range(heads):
        queries = query[head * group : (head + 1) * group].double()
        estimated = [logit(spec, _estimate(q, row, of, head)) for q in queries]
        middle = [each[sinks:begin] for each in estimated]
        if settings.select == "group":
            by = [sum(each.softmax(0) for each in middle)] * group
        else:
            by = [torch.stack(middle).amax(0)] * group if settings.select == "max" else middle
        for at, q in enumerate(queries):
            best = by[at].argsort(descending=True)[:room] + sinks
            own = sorted({*range(sinks), *range(begin, tokens), *best.tolist()})
            read.append(set(own))
            exact = logit(spec, row.key[head, own] @ q)
            other = [token for token in range(tokens) if token not in own] if settings.residual else []
            masses = torch.cat((exact, estimated[at][other])).exp()
            stands = [of["value"][head, row.word[head, token]] + _correction(row, of, head, token) for token in other]
            values = torch.cat((row.value[head, own], *(each[None] for each in stands)))
            total = masses.sum()
            if spec.sink_logits is not None:
                total = total + spec.sink_logits[head * group + at].double().exp()
            out[head * group + at] = masses @ values / total
    return out, read


def logit(spec: SoftmaxSpec, dots: Tensor) -> Tensor:
    found = dots * spec.scaling
    return found if spec.softcap is None else spec.softcap * torch.tanh(found / spec.softcap)


def count(keep: float | int, tokens: int) -> int:
    wanted = math.ceil(keep * tokens - 1e-9) if isinstance(keep, float) else keep
    return max(1, min(tokens, wanted))


def _estimate(query: Tensor, row: Sequence, of: dict[str, Tensor], head: int) -> Tensor:
    return row.left[head] @ (query @ of["query_map"][head]) + of["key"][head, row.word[head]] @ query


def _correction(row: Sequence, of: dict[str, Tensor], head: int, token: int) -> Tensor:
    """The mean of what codewords leave of the values of a full page."""
    page = slice(token // PAGE * PAGE, (token // PAGE + 1) * PAGE)
    if page.stop > row.key.shape[1]:
        return torch.zeros(row.value.shape[-1], dtype=torch.float64)
    return (row.value[head, page] - of["value"][head, row.word[head, page]]).mean(0)
