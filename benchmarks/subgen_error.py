"""Attention-output error of SubGen on a model's own queries, keys and values: ablations, bound and cost."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from measure import Timer
from torch import Tensor

from kvcal.artifacts import Artifact
from kvcal.runtime.attention import SoftmaxSpec, causal_attention
from kvcal.runtime.methods.full import Full
from kvcal.runtime.methods.subgen import SubGen
from kvcal.runtime.methods.subgen.sketch import Sketch
from kvcal.runtime.settings import new_store
from kvcal.runtime.store import Store

STEPS = 32
"""Decoded tokens whose outputs are compared, at the end of each block."""
SEEDS = (0, 1)
DEFAULT = SubGen(normaliser="clusters", window=128, s=256)
"""With the paper's estimate of both sums."""
ABLATIONS: dict[str, Sequence[Any]] = {
    "t": (1, 2, 4, 8, 16),
    "s": (64, 128, 256, 512, 1024),
    "window": (32, 64, 128, 256, 512),
    "clusters": (16, 32, 64, 128, 256),
    "growth": (1.05, 1.1, 1.25, 1.5, 2.0),
    "sinks": (0, 4, 16),
}


@dataclass(frozen=True)
class Captured:
    """One layer's tensors of one block, and the dense outputs of its last `STEPS` tokens."""

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    spec: SoftmaxSpec
    dense: Tensor
    """[1, Hq, STEPS, Dv]"""

    @classmethod
    def of(cls, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Captured:
        total = key.shape[2]
        limits = torch.arange(total - STEPS + 1, total + 1).unsqueeze(0)
        dense = causal_attention(query[:, :, -STEPS:], key, value, SoftmaxSpec(scaling), limits)
        return cls(layer, query, key, value, SoftmaxSpec(scaling), dense)

    @functools.cached_property
    def prefilled(self) -> Store:
        """All but the last `STEPS` tokens."""
        store = new_store(Full(record_mass=True).bind(self.layer, self.key.shape[3], None))
        prompt = slice(None, self.key.shape[2] - STEPS)
        store.prefill(self.query[:, :, prompt], self.key[:, :, prompt], self.value[:, :, prompt], self.spec)
        return store

    def steps(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(query, key, value) of one token each."""
        tensors = [of[:, :, -STEPS:].split(1, 2) for of in (self.query, self.key, self.value)]
        return list(zip(*tensors, strict=True))

    def error(self, output: Tensor) -> float:
        """Mean over steps and heads of ‖o - o_dense‖ / ‖o_dense‖."""
        return float(((output - self.dense).norm(dim=-1) / self.dense.norm(dim=-1)).mean())

    @property
    def full_bytes(self) -> int:
        return self.key.nbytes + self.value.nbytes


def decode(captured: Captured, store: Store) -> Tensor:
    store.take(*captured.prefilled.as_they_came())
    outputs = []
    for query, key, value in captured.steps():
        store.append(key, value)
        outputs.append(store.attend(query, captured.spec))
    return torch.cat(outputs, 2)


def sketch_of(store: Store) -> dict[str, Tensor]:
    assert isinstance(store.sequence_index, Sketch)
    return store.sequence_index.parts


def measured(captured: Sequence[Captured], artifact: Artifact | None, settings: SubGen) -> dict[str, Any]:
    """Of SubGen: error by layer, bytes held as a fraction of all keys' and values', mean number of clusters."""
    errors: dict[int, list[float]] = {}
    held, clusters = [], []
    for one in captured:
        for seed in SEEDS:
            method = dataclasses.replace(settings, seed=seed)
            store = new_store(method.bind(one.layer, one.key.shape[3], artifact))
            errors.setdefault(one.layer, []).append(one.error(decode(one, store)))
        held.append(store.resident_bytes() / one.full_bytes)
        clusters += sketch_of(store)["active"].flatten().tolist()
    return {**by_layer(errors), "resident": mean(held), "open_clusters": mean(clusters)}


def ablations(captured: Sequence[Captured], artifact: Artifact) -> dict[str, Any]:
    found: dict[str, Any] = {"default": dataclasses.asdict(DEFAULT), "of_default": {}, "by": {}}
    for name, given in (("artifact", artifact), ("keys", None)):
        found["of_default"][name] = measured(captured, given, DEFAULT)
    for name, values in ABLATIONS.items():
        found["by"][name] = [
            {name: value, **measured(captured, artifact, dataclasses.replace(DEFAULT, **{name: value}))}
            for value in values
        ]
        print(name, [(entry[name], round(entry["error"], 3)) for entry in found["by"][name]], flush=True)
    return found


def against_the_bound(captured: Sequence[Captured], artifact: Artifact | None) -> dict[str, Any]:
    """The error as a multiple of sqrt(Dv / s) ‖softmax(Kq)‖₂ ‖V‖_op, and the factor e^{2δr} that the bound also has.

    With sinks and window at their defaults; constants and the factor ln n of the theorem left out.
    """
    ratios, layers = [], []
    for one in captured:
        store = new_store(DEFAULT.bind(one.layer, one.key.shape[3], artifact))
        error = (decode(one, store) - one.dense).norm(dim=-1)  # [1, Hq, STEPS]
        group = one.query.shape[1] // one.key.shape[1]
        query = one.query[:, :, -STEPS:].unflatten(1, (-1, group))
        dots = (query @ one.key.unsqueeze(2).mT) * one.spec.scaling
        seen = torch.arange(one.key.shape[2]) <= torch.arange(one.key.shape[2] - STEPS, one.key.shape[2]).unsqueeze(1)
        weights = dots.masked_fill(~seen, -torch.inf).softmax(-1).norm(dim=-1)
        spectral = torch.linalg.matrix_norm(one.value, ord=2)[:, :, None, None]
        ratio = error / (math.sqrt(one.value.shape[3] / DEFAULT.s) * weights * spectral).flatten(1, 2)
        ratios.append(ratio.flatten())
        norms = one.query.unflatten(1, (-1, group)).norm(dim=-1).amax((0, 2, 3)) * one.spec.scaling
        delta = sketch_of(store)["delta"][0]
        layers.append({"layer": one.layer, "delta": delta.tolist(), "delta_r": (delta * norms).tolist()})
    every = torch.cat(ratios)
    quantiles = {f"p{round(100 * q)}": float(every.quantile(q)) for q in (0.5, 0.9, 0.99)}
    return {"ratio": {**quantiles, "max": float(every.max())}, "layers": layers[: len({one.layer for one in captured})]}


def cost(captured: Sequence[Captured], artifact: Artifact | None) -> dict[str, float]:
    """Seconds over all given layers and blocks, one thread, this process's own: dense attention of the prompt, the
    prompt's way into the sketch, and a decoded token (mean)."""
    timer, spent = Timer("cpu"), {"dense_prefill": 0.0, "into_the_sketch": 0.0, "step": 0.0}
    for one in captured:
        prompt = slice(None, one.key.shape[2] - STEPS)
        tensors = [of[:, :, prompt] for of in (one.query, one.key, one.value)]
        spent["dense_prefill"] += timer.seconds(lambda: causal_attention(*tensors, one.spec))  # noqa: B023
        store = new_store(DEFAULT.bind(one.layer, one.key.shape[3], artifact))
        store.take(*one.prefilled.as_they_came())
        (_, key, value), *others = one.steps()
        spent["into_the_sketch"] += timer.seconds(lambda: store.append(key, value))  # noqa: B023

        def rest(others: list[Any] = others, store: Store = store, spec: SoftmaxSpec = one.spec) -> None:
            for query, key, value in others:
                store.append(key, value)
                store.attend(query, spec)

        spent["step"] += timer.seconds(rest) / len(others) / len(captured)
    return {**spent, "ratio": spent["into_the_sketch"] / spent["dense_prefill"]}


def by_layer(errors: dict[int, list[float]]) -> dict[str, Any]:
    found = [mean(errors[layer]) for layer in sorted(errors)]
    return {"error": mean(found), "error_by_layer": found}


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
