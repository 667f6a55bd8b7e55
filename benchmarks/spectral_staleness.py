"""Does the selection of `spectral` go stale in 8192 decoded tokens? docs/results/spectral-staleness.md.

python benchmarks/spectral_staleness.py      # about ten minutes on two cores

As benchmarks/staleness.py, twice as far as the demo model's context: keys, values and queries come from one dense pass
over texts of 8320 tokens. Beyond 4096 the model predicts badly, but its keys and queries are what stores have to deal
with: they turn on by the rotary embedding. Beside recall: the relative error of the attention output.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from demo import demo_artifact, unseen_layers
from torch import Tensor

from kvcal.artifacts import Artifact
from kvcal.calibrate import LayerTensors, load_model
from kvcal.runtime.attention import Logits, probabilities
from kvcal.runtime.stores import METHODS
from kvcal.runtime.stores.full import FullStore

FOLDER = Path(__file__).parent.parent / "docs" / "results"
TEXTS, PREFIX, STEPS, EVERY, BINS = 2, 128, 8192, 128, 8
KEEP = 0.0625
CODES: dict[str, Any] = {"rank": 32, "bits": 2}
LOKI = {"rank": 32, "select": "group", "basis": "score"}
TRIED: dict[str, tuple[str, dict[str, Any], int]] = {
    "exact_topk": ("exact_topk", {"select": "group"}, 2048),
    "loki": ("loki", LOKI, 2048),
    "loki, calibrated at 4096": ("loki", LOKI, 4096),
    "spectral": ("spectral", CODES, 2048),
    "spectral, calibrated at 4096": ("spectral", CODES, 4096),
    "spectral, 4 bits, calibrated at 4096": ("spectral", {**CODES, "bits": 4}, 4096),
    "spectral, exact choice, calibrated at 4096": ("spectral", {**CODES, "choice": "exact"}, 4096),
    "spectral, no residual, calibrated at 4096": ("spectral", {**CODES, "residual": False}, 4096),
}
"""Method, settings, and tokens of the blocks that the artifact comes from."""


@torch.no_grad()
def run(layers: list[LayerTensors], name: str, settings: dict[str, Any], artifact: Artifact) -> dict[str, Any]:
    """{"read": bytes over dense, "recall": by bin, "error": by bin}, means over texts, layers and heads."""
    method = METHODS[name](keep=KEEP, **settings)
    recall, error = torch.zeros(BINS, dtype=torch.float64), torch.zeros(BINS, dtype=torch.float64)
    per_bin, read = STEPS // BINS // EVERY * len(layers), 0.0
    for layer in layers:
        key, value, logits = layer.key_post, layer.value, Logits(layer.scaling)
        store, full = method.build(layer.layer, key.shape[-1], artifact)(), FullStore()
        full.append(key[:, :, :PREFIX], value[:, :, :PREFIX])
        store.adopt(full)
        for step in range(STEPS):
            now = slice(PREFIX + step, PREFIX + step + 1)
            store.append(key[:, :, now], value[:, :, now])
            if (step + 1) % EVERY == 0:
                query, held = layer.query_post[:, :, now], slice(0, now.stop)
                weights = probabilities(query, key[:, :, held], logits)
                dense = (weights @ value[:, :, held].unsqueeze(2)).flatten(1, 2)
                out = store.attend(query, logits)
                error[step * BINS // STEPS] += relative(out, dense) / per_bin
                recall[step * BINS // STEPS] += recalled(store.read_mask(), weights.flatten(1, 2)[:, :, 0]) / per_bin
        read += store.bytes_read() / (key.nbytes + value.nbytes) / len(layers)
    return {"read": read, "recall": recall.tolist(), "error": error.tolist()}


def relative(out: Tensor, dense: Tensor) -> float:
    return float(((out - dense).norm(dim=-1) / dense.norm(dim=-1)).mean())


def recalled(read: Tensor, weights: Tensor) -> float:
    """Of each query head's tokens of highest weight [B, Hq, S], a quarter as many as are read, the share that is."""
    read = read.repeat_interleave(weights.shape[1] // read.shape[1], 1)
    top = max(1, round(weights.shape[-1] * KEEP / 4))
    return float(read.gather(-1, weights.topk(top).indices).float().mean())


def main() -> None:
    loaded = load_model("demo", device="cpu", dtype="float32")
    artifacts = {seq_len: demo_artifact(loaded, seq_len) for seq_len in (2048, 4096)}
    layers = unseen_layers(loaded, TEXTS, PREFIX + STEPS)
    results = {}
    for name, (method, settings, calibrated) in TRIED.items():
        results[name] = run(layers, method, settings, artifacts[calibrated])
        print(name, results[name], flush=True)
    (FOLDER / "spectral-staleness.json").write_text(json.dumps(results, indent=1) + "\n")
    (FOLDER / "spectral-staleness.md").write_text(page(results))


def page(results: dict[str, Any]) -> str:
    ends = [str(STEPS // BINS * (number + 1)) for number in range(BINS)]
    parts = [HEAD]
    for key, title in (("recall", "Recall of the top tokens"), ("error", "Relative error of the attention output")):
        header = ["method", "bytes at the end", *ends]
        lines = [header, ["---"] * len(header)]
        lines += [[name, f"{of['read']:.3f}", *(f"{each:.3f}" for each in of[key])] for name, of in results.items()]
        parts.append(
            f"{title}, by decoded tokens up to:\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in lines)
        )
    return "\n\n".join(parts) + "\n"


HEAD = f"""# Does spectral's selection go stale?

*The demo model's figures, which do not carry over to real ones: [real.md](real.md).*

`python benchmarks/spectral_staleness.py`: stores take over {PREFIX} tokens and grow by {STEPS}, one at a time,
twice the demo model's context, with the keys, values and queries of one dense pass over {TEXTS} unseen texts. Every
{EVERY} tokens: which of the tokens of highest dense attention (per query head, a quarter as many as are read) are
read, and the relative error of the attention output. A sixteenth of the tokens is read exactly; artifacts are
calibrated on blocks of 2048 tokens, or of 4096. Bytes are over those of dense attention in float32."""

if __name__ == "__main__":
    main()
