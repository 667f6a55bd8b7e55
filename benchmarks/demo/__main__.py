"""Does selection go stale while a text grows? Stores that grew token by token, beside stores built anew.

    python -m benchmarks.demo     # about five minutes on two cores

Keys, values and queries are those of one dense pass of the demo model over unseen texts, so that every store answers
the same queries. A store takes over a prefix of 128 tokens and then grows by one token at a time, as in decoding, to
the end of the model's context. At every checkpoint: which of the tokens of highest dense attention (per query head, a
quarter as many as are read) the store reads, and the dense attention mass of all that it reads. Means over texts,
layers, heads and the checkpoints of a bin.

Of what a store keeps beside keys and values only clusters depend on when a token came. So at the same checkpoints
the same queries go through stores of the same tokens that were clustered together, as a prompt is: `rebuilt` leaves
those tokens unclustered that the store that grew has not clustered yet, `rebuilt, all` none but the newest.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcal.artifacts import Artifact
from kvcal.calibrate import load_model
from kvcal.calibrate.capture import LayerTensors
from kvcal.runtime.attention import SoftmaxSpec, probabilities
from kvcal.runtime.methods import METHODS
from kvcal.runtime.methods.amounts import count_of
from kvcal.runtime.methods.clusters import Clusters
from kvcal.runtime.settings import new_store
from kvcal.runtime.store import Store

from ..shared.places import RESULTS
from .texts import demo_artifact, unseen_layers

TEXTS, PREFIX, TOKENS, CHECKPOINTS, BINS = 4, 128, 4096, 32, 8
EVERY = (TOKENS - PREFIX) // CHECKPOINTS
"""124, no multiple of a window: checkpoints meet it at all stages."""
KEEPS = {"256 tokens": 256, "an eighth of the tokens": 0.125}


@dataclass(frozen=True)
class Tried:
    method: str
    settings: dict[str, Any]
    calibrated: int = 2048
    """Tokens of the blocks that the artifact comes from."""


SMALL = {"tokens_per_cluster": 16, "window": 64, "sinks": 4}
LOKI = {"rank": 0.25, "select": "group", "basis": "score"}
TRIED = {
    "exact_topk": Tried("exact_topk", {"select": "group"}),
    "loki": Tried("loki", LOKI),
    "loki, calibrated at 4096": Tried("loki", LOKI, calibrated=TOKENS),
    "quest": Tried("quest", {"select": "group"}),
    "clusterkv, clusters of 16": Tried("clusterkv", SMALL),
    "clusterkv, clusters of 80": Tried("clusterkv", {"tokens_per_cluster": 80, "window": 320, "sinks": 16}),
    "streaming": Tried("streaming", {}),
}
GREW, REBUILT, REBUILT_ALL = "grew", "rebuilt", "rebuilt, all"


@dataclass
class Found:
    """Of one kind of store at one checkpoint: sums over layers, each a mean over texts and heads."""

    recall: float = 0.0
    mass: float = 0.0

    def add(self, store: Store, weights: Tensor, top: int) -> None:
        """
        Args:
            weights: [B, Hq, S] of dense attention.
        """
        read = store.read_mask()
        read = read.repeat_interleave(weights.shape[1] // read.shape[1], 1)
        self.recall += float(read.gather(-1, weights.topk(top).indices).float().mean())
        self.mass += float((weights * read).sum(-1).mean())


def checkpoints() -> range:
    """Tokens of a text at each."""
    return range(PREFIX + EVERY, TOKENS + 1, EVERY)


def dense(layer: LayerTensors) -> dict[int, Tensor]:
    """Tokens so far -> [B, Hq, S] weights of the newest query."""
    spec = SoftmaxSpec(layer.scaling)
    return {
        at: probabilities(layer.query_post[:, :, at - 1 : at], layer.key_post[:, :, :at], spec).flatten(1, 2).squeeze(2)
        for at in checkpoints()
    }


def grown(store: Store, layer: LayerTensors, begin: int, end: int) -> Iterator[int]:
    """Give the store the first `begin` tokens as a prompt, then one at a time; yields the tokens so far."""
    store.take(layer.key_post[:, :, :begin], layer.value[:, :, :begin])
    for at in range(begin, end):
        store.append(layer.key_post[:, :, at : at + 1], layer.value[:, :, at : at + 1])
        yield at + 1


def run(
    layers: list[LayerTensors], weights: list[dict[int, Tensor]], tried: Tried, keep: int | float, artifact: Artifact
) -> dict[str, Any]:
    method = METHODS[tried.method](keep=keep, **tried.settings)
    found = {kind: {at: Found() for at in checkpoints()} for kind in (GREW, REBUILT, REBUILT_ALL)}
    read = 0.0
    rebuilds = False
    for layer, of_layer in zip(layers, weights, strict=True):
        build = partial(new_store, method.bind(layer.layer, layer.key_post.shape[-1], artifact))
        spec, store = SoftmaxSpec(layer.scaling), build()
        clusters = store.sequence_index
        for at in grown(store, layer, PREFIX, TOKENS):
            if at not in of_layer:
                continue
            query, top = layer.query_post[:, :, at - 1 : at], max(1, count_of(keep, at) // 4)
            store.attend(query, spec)
            found[GREW][at].add(store, of_layer[at], top)
            if isinstance(clusters, Clusters) and clusters.buffers:
                rebuilds = True
                for kind, upto in ((REBUILT, clusters.upto[0]), (REBUILT_ALL, at - 1)):
                    fresh = build()
                    assert list(grown(fresh, layer, upto, at))[-1] == at
                    fresh.attend(query, spec)
                    found[kind][at].add(fresh, of_layer[at], top)
        held = layer.key_post.nbytes + layer.value.nbytes
        read += store.bytes_read() / held / len(layers)
    kinds = (GREW, REBUILT, REBUILT_ALL) if rebuilds else (GREW,)
    return {"read": read, **{kind: binned(found[kind], len(layers)) for kind in kinds}}


def binned(found: dict[int, Found], layers: int) -> list[dict[str, float]]:
    size = len(found) // BINS
    items = list(found.items())
    rows = []
    for first in range(0, len(items), size):
        inside = items[first : first + size]
        row = {"to_step": float(inside[-1][0] - PREFIX)}
        for name in ("recall", "mass"):
            row[name] = sum(getattr(part, name) for _, part in inside) / layers / size
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "demo" / "staleness.json")
    parser.add_argument("--method", choices=TRIED, action="append", help="only this one; may be repeated")
    options = parser.parse_args()
    torch.manual_seed(0)
    loaded = load_model("demo", device="cpu")
    artifacts = {length: demo_artifact(loaded, length) for length in (2048, TOKENS)}
    layers = unseen_layers(loaded, TEXTS, TOKENS)
    weights = [dense(layer) for layer in layers]
    results: dict[str, dict[str, Any]] = {}
    for budget, keep in KEEPS.items():
        results[budget] = {}
        for name, tried in TRIED.items():
            if options.method and name not in options.method:
                continue
            found = run(layers, weights, tried, keep, artifacts[tried.calibrated])
            results[budget][name] = {"settings": {"keep": keep, **tried.settings}, **found}
            print(budget, name, found, flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
