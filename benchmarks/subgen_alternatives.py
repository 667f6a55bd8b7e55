"""What else one could do with the bytes of a sketch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from subgen_error import SEEDS, STEPS, Captured, by_layer, decode
from torch import Tensor

from kvcal.artifacts import Artifact
from kvcal.runtime.methods.h2o import H2O
from kvcal.runtime.methods.streaming import Streaming
from kvcal.runtime.methods.subgen import SubGen
from kvcal.runtime.methods.subgen.attention import attention_with_sketch
from kvcal.runtime.settings import new_store

WAYS = ("subgen", "greedy k-center", "one cluster", "values for both", "uniform tokens", "streaming", "h2o")


def alternatives(captured: Sequence[Captured], artifact: Artifact, shapes: dict[str, SubGen]) -> list[dict[str, Any]]:
    """At the bytes of each of `shapes`: SubGen, other ways to represent what is outside its sinks and window, and the
    methods that hold tokens only."""
    rows = []
    for name, settings in shapes.items():
        tokens = settings.sinks + settings.window + outside(settings)
        for way in WAYS:
            errors: dict[int, list[float]] = {}
            for one in captured:
                for seed in SEEDS if way not in ("streaming", "h2o") else SEEDS[:1]:
                    output = run(way, one, dataclasses.replace(settings, seed=seed), artifact)
                    errors.setdefault(one.layer, []).append(one.error(output))
            found = {"budget": name, "tokens": tokens, "fraction": tokens / captured[0].key.shape[2], "way": way}
            rows.append({**found, **by_layer(errors)})
            print(name, tokens, way, round(rows[-1]["error"], 3), flush=True)
    return rows


def outside(settings: SubGen) -> int:
    """Tokens (a key and a value of the same width) that take the bytes of a sketch: s samples and C (t + 1) keys."""
    return settings.s + settings.clusters * (settings.t + 1) // 2


def run(way: str, one: Captured, settings: SubGen, artifact: Artifact) -> Tensor:
    """[1, Hq, STEPS, Dv]"""
    per_token = 2 * one.key.shape[3] * one.key.element_size()
    held = (settings.sinks + settings.window + outside(settings)) * per_token
    if way == "subgen":
        return decode(one, new_store(settings.bind(one.layer, one.key.shape[3], artifact)))
    if way == "values for both":
        settings = dataclasses.replace(settings, s=outside(settings), normaliser="values")
        return decode(one, new_store(settings.bind(one.layer, one.key.shape[3], artifact)))
    if way == "streaming":  # an int32 position beside each token
        return decode(one, new_store(Streaming(keep=held // (per_token + 4)).bind(one.layer, 0, None)))
    if way == "h2o":  # and the attention received
        return decode(one, new_store(H2O(keep=held // (per_token + 8)).bind(one.layer, 0, None)))
    if way == "greedy k-center":
        return sketched(one, settings, greedy)
    if way == "one cluster":
        keys = settings.clusters * (settings.t + 1)
        return sketched(one, dataclasses.replace(settings, clusters=1, t=keys), single)
    return uniform(one, settings)


def sketched(captured: Captured, settings: SubGen, cluster: Callable[[Tensor, int], Tensor]) -> Tensor:
    """SubGen's estimators with clusters of `cluster`(keys [n, D], how many) -> labels [n], made from all keys at once.

    The sketch is made once, of what lies outside the last step's window; the window is that of each step.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    start, stop = settings.sinks, captured.key.shape[2] - settings.window
    key, value = captured.key[:, :, start:stop], captured.value[:, :, start:stop]
    heads, width = key.shape[1], key.shape[3]
    sample = torch.zeros(1, heads, settings.clusters, settings.t, width)
    counts = torch.zeros(1, heads, settings.clusters, dtype=torch.int32)
    for head in range(heads):
        labels = cluster(key[0, head], settings.clusters)
        for number in range(settings.clusters):
            (members,) = (labels == number).nonzero(as_tuple=True)
            counts[0, head, number] = len(members)
            if len(members):
                chosen = torch.randint(len(members), (settings.t,), generator=generator)
                sample[0, head, number] = key[0, head, members[chosen]]
    drawn = torch.stack(
        [torch.multinomial(v.square().sum(-1), settings.s, True, generator=generator) for v in value[0]]
    )
    index = drawn[None, :, :, None].expand(-1, -1, -1, width)
    mass = value.double().square().sum((2, 3))
    sketch = {"sample": sample, "count": counts, "value_key": key.gather(2, index), "mass": mass}
    sketch["value"] = value.gather(2, index)
    return torch.cat(
        [
            attention_with_sketch(query, *exact, sketch, captured.spec, torch.tensor([[exact[0].shape[2]]]))
            for query, exact in windows(captured, start, stop)
        ],
        2,
    )


def uniform(captured: Captured, settings: SubGen) -> Tensor:
    """The same tokens in numerator and normaliser, drawn uniformly, each in place of n / count."""
    generator = torch.Generator().manual_seed(settings.seed)
    start, stop = settings.sinks, captured.key.shape[2] - settings.window
    key, value = captured.key[:, :, start:stop], captured.value[:, :, start:stop]
    count = outside(settings)
    drawn = torch.multinomial(torch.ones(value.shape[1:3]), count, generator=generator).unsqueeze(0)
    stands_for = value.shape[2] / count
    index = drawn.unsqueeze(-1).expand(-1, -1, -1, key.shape[3])
    sampled_key, sampled_value = key.gather(2, index), value.gather(2, index)
    outputs = []
    for query, (exact_key, exact_value) in windows(captured, start, stop):
        packed = query.unflatten(1, (key.shape[1], -1)).squeeze(3)
        dots = packed @ torch.cat((exact_key, sampled_key), 2).mT
        logits = captured.spec.logits(dots)
        logits[..., exact_key.shape[2] :] += math.log(stands_for)
        outputs.append((logits.softmax(-1) @ torch.cat((exact_value, sampled_value), 2)).flatten(1, 2).unsqueeze(2))
    return torch.cat(outputs, 2)


def windows(captured: Captured, start: int, stop: int) -> list[tuple[Tensor, tuple[Tensor, Tensor]]]:
    """(query, exact keys and values) of each step: all but the tokens from `start` to `stop`, as far as they came."""
    found = []
    total = captured.key.shape[2]
    for at in range(total - STEPS, total):
        exact = [torch.cat((of[:, :, :start], of[:, :, stop : at + 1]), 2) for of in (captured.key, captured.value)]
        found.append((captured.query[:, :, at : at + 1], (exact[0], exact[1])))
    return found


def greedy(key: Tensor, clusters: int) -> Tensor:
    """Farthest-first traversal (Gonzalez 1985): labels [n] of keys [n, D]."""
    nearest = torch.full(key.shape[:1], torch.inf)
    labels = torch.zeros(len(key), dtype=torch.int64)
    chosen = 0
    for number in range(clusters):
        distance = (key - key[chosen]).norm(dim=-1)
        labels[distance < nearest] = number
        nearest = torch.minimum(nearest, distance)
        chosen = int(nearest.argmax())
    return labels


def single(key: Tensor, clusters: int) -> Tensor:
    return torch.zeros(len(key), dtype=torch.int64)
