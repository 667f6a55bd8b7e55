"""What the tail is worth: attention-output error of selecting methods with and without it, on the demo model.

python benchmarks/tail.py      # about two minutes on two cores; writes docs/results/tail.md and tail.json

Keys, queries and values of 2048 tokens of unseen text; the last 64 queries attend through the stores that
decode. Error: ‖o − o_dense‖ / ‖o_dense‖, mean over layers, heads and queries. Bytes: what the stores count, over
those of dense attention.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcal.artifacts import Artifact
from kvcal.calibrate import LayerTensors, calibrate, capture, load_model, make_blocks, open_data
from kvcal.runtime.attention import Logits, probabilities
from kvcal.runtime.stores import METHODS
from kvcal.runtime.stores.clustered import ClusteredStore
from kvcal.runtime.stores.clusters import Clusters
from kvcal.runtime.stores.exact_topk import ExactTopk, ExactTopkStore
from kvcal.runtime.stores.full import FullStore

FOLDER = Path(__file__).parent.parent / "docs" / "results"
TOKENS, QUERIES = 2048, 64
METHODS_TRIED: list[tuple[str, dict[str, Any]]] = [
    ("exact_topk", {}),
    ("exact_topk", {"tail": True, "tokens_per_cluster": 16}),
    ("exact_topk", {"tail": True, "tokens_per_cluster": 80}),
    ("loki", {"basis": "score", "select": "group"}),
    ("loki", {"basis": "score", "select": "group", "tail": True, "tokens_per_cluster": 16}),
    ("loki", {"basis": "score", "select": "group", "tail": True, "tokens_per_cluster": 80}),
    ("quest", {"select": "group"}),
    ("quest", {"select": "group", "tail": True, "tokens_per_cluster": 16}),
    ("clusterkv", {"tokens_per_cluster": 16, "sinks": 4}),
    ("clusterkv", {"tokens_per_cluster": 16, "sinks": 4, "tail": True}),
    ("clusterkv", {"tokens_per_cluster": 80, "sinks": 4}),
    ("clusterkv", {"tokens_per_cluster": 80, "sinks": 4, "tail": True}),
]


class Estimator(ExactTopkStore):
    """Exact top-k with another estimate of the tail."""

    second_order = 0.0
    """Fraction of ½ qᵀΣq, Σ the covariance of keys within their clusters, pooled over a head's clusters."""
    bits = 16

    def attend(self, query: Tensor, logits: Logits) -> Tensor:
        if self.bits < 16 and not getattr(self, "_rounded", False):
            self._rounded = True
            for name in ("cluster.key", "cluster.value"):
                self.rows[name].view.copy_(rounded(self.rows[name].view, self.bits))
        return super().attend(query, logits)

    def _mean_logits(self, query: Tensor, logits: Logits, clusters: Clusters) -> Tensor:
        found = super()._mean_logits(query, logits, clusters)
        if not self.second_order:
            return found
        grouped = self._grouped(query)
        spread = torch.einsum("bhgd,bhde,bhge->bhg", grouped, self._covariance(clusters), grouped) * logits.scaling**2
        return found + 0.5 * self.second_order * spread.unsqueeze(-1)

    def _covariance(self, clusters: Clusters) -> Tensor:
        key, of = self.rows["key"].view, self.rows["cluster.of"].view.long()
        centred = key[:, :, : of.shape[2]] - clusters.keys.gather(2, of.clamp_min(0).expand(-1, -1, -1, key.shape[3]))
        centred = centred[:, :, self.selection.sinks :]
        return centred.mT @ centred / centred.shape[2]


def rounded(tensor: Tensor, bits: int) -> Tensor:
    """Symmetric rounding with one scale per row of D numbers."""
    largest = 2 ** (bits - 1) - 1
    scale = tensor.abs().amax(-1, keepdim=True) / largest
    return (tensor / scale).round().clamp(-largest - 1, largest) * scale


def layers() -> tuple[list[LayerTensors], Artifact]:
    """Of the demo model: one row of unseen text, and an artifact of other text."""
    loaded = load_model("demo", device="cpu")
    data = open_data("stdlib")
    blocks = make_blocks(data, loaded.tokenizer, num_tokens=131072, seq_len=2048, source=data.source)
    artifact = calibrate(loaded.model, blocks, model_id="demo")
    unseen = make_blocks(open_data("stdlib", "heldout"), loaded.tokenizer, num_tokens=TOKENS, seq_len=TOKENS)
    found: list[LayerTensors] = []
    with torch.no_grad(), capture(loaded.model, found.append):
        loaded.model(input_ids=unseen.ids.long(), use_cache=False)
    return found, artifact


def outcome(found: list[LayerTensors], build: Callable[[int, int], ClusteredStore]) -> tuple[float, float]:
    """(mean error, bytes read over dense)."""
    errors, read, dense_read = [], 0, 0
    for layer in found:
        store = build(layer.layer, layer.key_post.shape[-1])
        split = TOKENS - QUERIES
        full = FullStore()
        full.append(layer.key_post[:, :, :split], layer.value[:, :, :split])
        store.adopt(full)
        logits = Logits(layer.scaling)
        for key, value, query in steps(layer, split):
            store.append(key, value)
            full.append(key, value)
            held_key, held_value = full.rows["key"].view, full.rows["value"].view
            weights = probabilities(query, held_key, logits)
            dense = (weights @ held_value.unsqueeze(2)).flatten(1, 2)
            error = (store.attend(query, logits) - dense).norm(dim=-1) / dense.norm(dim=-1)
            errors.append(error.mean())
            read += store.bytes_read()
            dense_read += held_key.nbytes + held_value.nbytes
    return float(torch.stack(errors).mean()), read / dense_read


def steps(layer: LayerTensors, split: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for at in range(split, TOKENS):
        now = slice(at, at + 1)
        yield layer.key_post[:, :, now], layer.value[:, :, now], layer.query_post[:, :, now]


def estimator(**attributes: Any) -> Callable[[int, int, int], ClusteredStore]:
    def build(keep: int, layer: int, head_dim: int) -> ClusteredStore:
        store = Estimator(ExactTopk(keep=keep, tail=True))
        for name, value in attributes.items():
            setattr(store, name, value)
        return store

    return build


ESTIMATORS = {
    "mean key, mean value": estimator(),
    "8-bit means": estimator(bits=8),
    "4-bit means": estimator(bits=4),
    "3-bit means": estimator(bits=3),
    "+ 0.1 of the second order": estimator(second_order=0.1),
    "+ 0.2 of the second order": estimator(second_order=0.2),
    "+ the whole second order": estimator(second_order=1.0),
}


def main() -> None:
    found, artifact = layers()
    rows = []
    for name, settings in METHODS_TRIED:
        row: dict[str, Any] = {"method": name, **settings}
        for keep in (128, 64):
            method = METHODS[name](keep=keep, **settings)
            error, read = outcome(found, lambda layer, dim, m=method: m.build(layer, dim, artifact)())
            row |= {f"error@{keep}": error, f"read@{keep}": read}
        rows.append(row)
        print(row, flush=True)
    estimators = []
    for name, build in ESTIMATORS.items():
        row = {"estimator": name}
        for keep in (128, 64):
            row[f"error@{keep}"] = outcome(found, lambda layer, dim, b=build, k=keep: b(k, layer, dim))[0]
        estimators.append(row)
        print(row, flush=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "tail.json").write_text(json.dumps({"methods": rows, "estimators": estimators}, indent=1) + "\n")
    (FOLDER / "tail.md").write_text(page(rows, estimators))


def page(rows: list[dict[str, Any]], estimators: list[dict[str, Any]]) -> str:
    lines = ["| method | settings | 128 tokens | read | 64 tokens | read |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        settings = " ".join(f"{k} {v}" for k, v in row.items() if k != "method" and "@" not in k)
        lines.append(
            f"| {row['method']} | {settings} | {row['error@128']:.3f} | {row['read@128']:.3f} "
            f"| {row['error@64']:.3f} | {row['read@64']:.3f} |"
        )
    other = [
        "| estimate of the tail, over exact top-k, clusters of 16 | 128 tokens | 64 tokens |",
        "| --- | --- | --- |",
    ]
    other += [f"| {row['estimator']} | {row['error@128']:.4f} | {row['error@64']:.4f} |" for row in estimators]
    return HEAD + "\n".join(lines) + "\n\n" + "\n".join(other) + "\n"


HEAD = """# What the tail is worth

`python benchmarks/tail.py`: the demo model, 2048 tokens of unseen text, the last 64 queries, through the stores that
decode. Relative attention-output error (mean over layers, heads and queries) with 128 and 64 tokens read, and bytes
read over those of dense attention (float32; clusters, memberships and projections counted).

"""

if __name__ == "__main__":
    main()
