"""What a compressed cache costs at a prompt and at the first token after it, as ratios within one run.

python benchmarks/prefill.py MODEL ARTIFACT    # --tokens 7680; CPU seconds of one thread

Prefill over that of transformers' own cache, the first decoded token over the later ones, and these over full
attention's. Writes benchmarks/results/prefill-cpu.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from measure import Timer, machine

from kvcal.calibrate import load_model, make_blocks, open_data
from kvcal.runtime import compress, load

RESULTS = Path(__file__).parent / "results" / "prefill-cpu.json"
STEPS = 8
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "spectral": {"method": "spectral"},
    "spectral, rows of 8 bits": {"method": "spectral", "rows": 8},
    "clusterkv": {"method": "clusterkv"},
    "clusterkv, the paper's": {"method": "clusterkv", "tokens_per_cluster": 80},
    "clusterkv, 3 passes": {"method": "clusterkv", "iterations": 3},
    "clusterkv, the paper's, 3 passes": {"method": "clusterkv", "tokens_per_cluster": 80, "iterations": 3},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("artifact")
    parser.add_argument("--tokens", type=int, default=7680)
    options = parser.parse_args()
    torch.set_num_threads(1)  # CPU seconds of several count their waiting for one another
    loaded, artifact = load_model(options.model, device="cpu", dtype="float32"), load(options.artifact)
    data = open_data("stdlib", "heldout")
    ids = make_blocks(data, loaded.tokenizer, num_tokens=options.tokens, seq_len=options.tokens).ids.long()
    found = {"stock": timed(loaded.model, ids)}
    for name, setting in SETTINGS.items():
        with compress(loaded.model, artifact, **setting):
            found[name] = timed(loaded.model, ids)
    stock, full = found["stock"], found["full"]
    rows = {
        name: {
            "prefill / stock": of["prefill"] / stock["prefill"],
            "first / later tokens": of["first"] / of["later"],
            "wait for the first / prefill": (of["first"] - of["later"]) / of["prefill"],
            "later tokens / full": of["later"] / full["later"],
        }
        for name, of in found.items()
    }
    body = {
        "model": options.model,
        "tokens": options.tokens,
        "machine": machine(),
        "cpu_seconds": found,
        "ratios": rows,
    }
    RESULTS.write_text(json.dumps(body, indent=1) + "\n")
    for name, row in rows.items():
        print(f"{name}: " + ", ".join(f"{what} {value:.2f}" for what, value in row.items()))


@torch.no_grad()
def timed(model: Any, ids: torch.Tensor) -> dict[str, float]:
    """CPU seconds of "prefill", of the "first" token after it and of the "later" ones, by their median."""
    timer, state = Timer("cpu"), {}

    def prompt() -> None:
        state["out"] = model(ids, use_cache=True, logits_to_keep=1)

    def step() -> None:
        last = state["out"].logits[:, -1:].argmax(-1)
        state["out"] = model(last, past_key_values=state["out"].past_key_values)

    prefill, *steps = (timer.seconds(call) for call in (prompt, *[step] * (1 + STEPS)))
    return {"prefill": prefill, "first": steps[0], "later": statistics.median(steps[1:])}


if __name__ == "__main__":
    main()
