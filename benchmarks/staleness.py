"""Does selection go stale while a text grows? Recall of the true top tokens against the decoded step.

python benchmarks/staleness.py     # about five minutes on two cores; writes docs/results/staleness.md, .json and .png

The demo model reads unseen text token by token, teacher-forced, after a prefix of 128: as many decoded tokens as
its context allows.
At every 16th step: which of the 64 tokens of highest dense attention (per query head) the method read, and the
dense attention mass of what it read; means over layers and heads, in bins of steps.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcal.artifacts import Artifact
from kvcal.calibrate import calibrate, load_model, make_blocks, open_data
from kvcal.runtime import CompressedCache
from kvcal.runtime.attention import probabilities

FOLDER = Path(__file__).parent.parent / "docs" / "results"
PREFIX, TOKENS, TOP, EVERY, BINS = 128, 4096, 64, 16, 8
TRIED: dict[str, dict[str, Any]] = {
    "loki, score basis": {"method": "loki", "basis": "score", "select": "group", "keep": 256},
    "clusterkv, window 320": {"method": "clusterkv", "keep": 512, "sinks": 16},
    "clusterkv, window 64, clusters of 16": {
        "method": "clusterkv",
        "keep": 256,
        "sinks": 4,
        "window": 64,
        "tokens_per_cluster": 16,
    },
    "quest": {"method": "quest", "select": "group", "keep": 256},
    "streaming": {"method": "streaming", "keep": 256},
}


class Watch:
    """Observer of a cache: recall and mass at some steps, from all keys so far."""

    def __init__(self, layers: int):
        self.keys: list[list[Tensor]] = [[] for _ in range(layers)]
        self.found: dict[int, list[tuple[float, float]]] = {}

    def __call__(self, layer: int, store: Any, query: Tensor, key: Tensor, value: Any, logits: Any, out: Any) -> None:
        self.keys[layer].append(key)
        step = store.seen - PREFIX
        if step % EVERY:
            return
        keys = self.keys[layer] = [torch.cat(self.keys[layer], 2)]
        weights = probabilities(query, keys[0], logits).flatten(1, 2).squeeze(2)
        read = store.read_mask()
        read = read.repeat_interleave(query.shape[1] // read.shape[1], 1)
        best = weights.topk(min(TOP, weights.shape[-1])).indices
        recall = read.gather(-1, best).float().mean()
        self.found.setdefault(step, []).append((float(recall), float((weights * read).sum(-1).mean())))


def run(model: Any, ids: Tensor, artifact: Artifact, setting: dict[str, Any]) -> dict[int, tuple[float, float]]:
    """Decoded step -> (recall, mass)."""
    full = CompressedCache(model, None, "full")
    cache = CompressedCache(model, artifact, **setting)
    watch = Watch(model.config.num_hidden_layers)
    with torch.no_grad():
        model(ids[:, :PREFIX], past_key_values=full)
        for layer, store in full.stores.items():
            watch.keys[layer].append(store.rows["key"].view)
        cache.adopt(full)
        cache.observer = watch
        for at in range(PREFIX, ids.shape[1]):
            model(ids[:, at : at + 1], past_key_values=cache)
    layers = len(watch.keys)
    return {
        step: (sum(r for r, _ in pairs) / layers, sum(m for _, m in pairs) / layers)
        for step, pairs in watch.found.items()
    }


def binned(found: dict[int, tuple[float, float]]) -> list[dict[str, float]]:
    last = max(found)
    width = -(-last // BINS)
    rows = []
    for first in range(0, last, width):
        inside = [pair for step, pair in found.items() if first < step <= first + width]
        rows.append(
            {
                "to_step": first + width,
                "recall": sum(pair[0] for pair in inside) / len(inside),
                "mass": sum(pair[1] for pair in inside) / len(inside),
            }
        )
    return rows


def main() -> None:
    torch.manual_seed(0)
    loaded = load_model("demo", device="cpu")
    data = open_data("stdlib")
    blocks = make_blocks(data, loaded.tokenizer, num_tokens=131072, seq_len=2048, source=data.source)
    artifact = calibrate(loaded.model, blocks, model_id="demo")
    unseen = make_blocks(open_data("stdlib", "heldout"), loaded.tokenizer, num_tokens=TOKENS, seq_len=TOKENS)
    results = {}
    for name, setting in TRIED.items():
        results[name] = {"setting": setting, "bins": binned(run(loaded.model, unseen.ids.long(), artifact, setting))}
        print(name, results[name]["bins"], flush=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "staleness.json").write_text(json.dumps(results, indent=1) + "\n")
    (FOLDER / "staleness.png").write_bytes(figure(results))
    (FOLDER / "staleness.md").write_text(page(results))


def figure(results: dict[str, Any]) -> bytes:
    from kvcal.calibrate.plots import png, two_panels

    drawing, axes = two_panels()
    for axis, name, label in zip(
        axes, ("recall", "mass"), (f"recall of the top {TOP} tokens", "dense attention mass read"), strict=True
    ):
        for method, found in results.items():
            steps = [row["to_step"] for row in found["bins"]]
            axis.plot(steps, [row[name] for row in found["bins"]], marker="o", markersize=4, label=method)
        axis.set(xlabel="decoded tokens", ylabel=label, ylim=(0, 1.02))
    axes[0].legend(fontsize=8, frameon=False)
    return png(drawing, "demo model, unseen text, 256 tokens read per step (clusterkv with window 320: 512)")


def page(results: dict[str, Any]) -> str:
    steps = [row["to_step"] for row in next(iter(results.values()))["bins"]]
    out = io.StringIO()
    out.write("# Does selection go stale?\n\n`python benchmarks/staleness.py`: the demo model reads ")
    out.write(f"unseen text token by token after a prefix of {PREFIX}.\n\n")
    for name, title in (("recall", f"Recall of the {TOP} tokens of highest dense attention"), ("mass", "Mass read")):
        out.write(f"{title}, by decoded tokens up to:\n\n| method | " + " | ".join(map(str, steps)) + " |\n")
        out.write("| --- " * (len(steps) + 1) + "|\n")
        for method, found in results.items():
            out.write(f"| {method} | " + " | ".join(f"{row[name]:.3f}" for row in found["bins"]) + " |\n")
        out.write("\n")
    out.write("![recall and mass by decoded tokens](staleness.png)\n")
    return out.getvalue()


if __name__ == "__main__":
    main()
