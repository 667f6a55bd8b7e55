"""Each method written down from its paper, for one row without padding, token by token and head by head.

Everything is float64 and slow. Nothing here is shared with the runtime but the parameters' names. The budget of
a step is ceil(keep · n) of the row's n tokens, the new one included, at least 1 and at most n.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from oracle_heads import Head, amount, budget, heads_at
from sequences import Row, Step
from torch import Tensor

from kvcal.runtime.attention import SoftmaxSpec


def rankings(scores: list[Tensor], select: str) -> list[Tensor]:
    """What each head of a group sorts by: its own scores, the group's highest, or the mean of the group's softmaxes."""
    if select == "head":
        return scores
    if select == "max":
        return [torch.stack(scores).amax(0)] * len(scores)
    return [torch.stack([each.softmax(-1) for each in scores]).mean(0)] * len(scores)


def highest(scores: Tensor, count: int) -> Tensor:
    return scores.sort(descending=True).indices[:count]


def causal(row: Row, spec: SoftmaxSpec) -> Tensor:
    """[Hq, prompt, Dv]: dense attention from every token of the prompt."""
    row = row.double()
    output = torch.empty(row.query.shape[0], row.prompt, row.value.shape[-1], dtype=torch.float64)
    for kv_head in range(row.key.shape[0]):
        for tokens in range(1, row.prompt + 1):
            for head in heads_at(row, spec, kv_head, tokens):
                output[head.index, tokens - 1] = head.attend(torch.arange(tokens))
    return output


def memoryless(
    rule: Callable[[list[Head], int, dict], list[tuple[Tensor, Tensor]]], row: Row, spec: SoftmaxSpec, settings: dict
) -> list[Step]:
    """The steps of a method that keeps everything: `rule` gives (chosen tokens, output) of each head of a group."""
    row, steps = row.double(), []
    for tokens in range(row.prompt + 1, row.key.shape[1] + 1):
        output = torch.empty(row.query.shape[0], row.value.shape[-1], dtype=torch.float64)
        read = torch.zeros(row.query.shape[0], tokens, dtype=torch.bool)
        for kv_head in range(row.key.shape[0]):
            heads = heads_at(row, spec, kv_head, tokens)
            for head, (chosen, of) in zip(heads, rule(heads, budget(settings, tokens), settings), strict=True):
                output[head.index], read[head.index, chosen] = of, True
        steps.append(Step(output, read))
    return steps


def full(row: Row, spec: SoftmaxSpec, **settings: object) -> list[Step]:
    return memoryless(lambda heads, _, __: [(every(h), h.attend(every(h))) for h in heads], row, spec, {"keep": 1.0})


def every(head: Head) -> Tensor:
    return torch.arange(len(head.key))


def exact_topk(row: Row, spec: SoftmaxSpec, **settings: object) -> list[Step]:
    def rule(heads: list[Head], k: int, settings: dict) -> list[tuple[Tensor, Tensor]]:
        by = rankings([head.logit(head.key @ head.query) for head in heads], settings.get("select", "head"))
        chosen = [highest(scores, k) for scores in by]
        return [(tokens, head.attend(tokens)) for head, tokens in zip(heads, chosen, strict=True)]

    return memoryless(rule, row, spec, settings)


def loki(row: Row, spec: SoftmaxSpec, query_map: Tensor, key_map: Tensor, **settings: object) -> list[Step]:
    """Algorithm 1: rank by the products of the first r coordinates, then exact attention to the k highest.

    Args:
        query_map, key_map: [Hkv, r, D].
    """
    group = row.query.shape[0] // row.key.shape[0]

    def rule(heads: list[Head], k: int, settings: dict) -> list[tuple[Tensor, Tensor]]:
        to_query, to_key = (each[heads[0].index // group].double() for each in (query_map, key_map))
        scores = [head.logit((head.key @ to_key.T) @ (to_query @ head.query)) for head in heads]
        chosen = [highest(by, k) for by in rankings(scores, settings.get("select", "head"))]
        return [(tokens, head.attend(tokens)) for head, tokens in zip(heads, chosen, strict=True)]

    return memoryless(rule, row, spec, settings)


def quest(row: Row, spec: SoftmaxSpec, **settings: object) -> list[Step]:
    """Pages by Σ_i max(q_i·min_i, q_i·max_i); ceil(k / page) of them, the one that is growing always."""

    def rule(heads: list[Head], k: int, settings: dict) -> list[tuple[Tensor, Tensor]]:
        page = settings.get("page", 16)
        pages = every(heads[0]).split(page)
        bounds = []
        for head in heads:
            boxes = [(head.key[tokens].amin(0), head.key[tokens].amax(0)) for tokens in pages]
            bounds.append(
                head.logit(torch.stack([torch.maximum(head.query * a, head.query * b).sum() for a, b in boxes]))
            )
        chosen = []
        for by in rankings(bounds, settings.get("select", "head")):
            others = highest(by[:-1], -(-k // page) - 1)
            chosen.append(torch.cat([pages[which] for which in [*others.tolist(), len(pages) - 1]]))
        return [(tokens, head.attend(tokens)) for head, tokens in zip(heads, chosen, strict=True)]

    return memoryless(rule, row, spec, settings)


def sparq(row: Row, spec: SoftmaxSpec, **settings: object) -> list[Step]:
    """Algorithm 1, with l = k / 4 local tokens; a group that selects together sums |q| and averages ŝ, as the
    paper's appendix on grouped queries does."""

    def rule(heads: list[Head], k: int, settings: dict) -> list[tuple[Tensor, Tensor]]:
        select = settings.get("select", "head")
        tokens = len(heads[0].key)
        magnitudes = [head.query.abs() for head in heads]
        if select == "group":
            magnitudes = [torch.stack(magnitudes).sum(0)] * len(heads)
        rank = amount(settings.get("rank", 0.25), heads[0].query.shape[0])
        scores, estimates = [], []
        for head, magnitude in zip(heads, magnitudes, strict=True):
            channels = highest(magnitude, rank)
            part = head.query[channels]
            temperature = math.sqrt(part.abs().sum() / head.query.abs().sum())  # times sqrt(D), in the scaling
            scores.append(head.logit((head.key[:, channels] @ part) / temperature))
            estimates.append(scores[-1].softmax(-1))
        if select == "group":
            estimates = [torch.stack(estimates).mean(0)] * len(heads)
        local = torch.arange(tokens) >= tokens - k // 4
        results = []
        for head, own, estimate in zip(heads, scores, estimates, strict=True):
            chosen = highest(estimate + local, k)
            unread = torch.ones(tokens, dtype=torch.bool)
            unread[chosen] = False
            alpha = 1 - head.softmax(own)[unread].sum()
            results.append((chosen, alpha * head.attend(chosen) + (1 - alpha) * head.value.mean(0)))
        return results

    return memoryless(rule, row, spec, settings)
