"""What a compressed cache costs at a prompt and at the first token after it, as ratios within one run.

Prefill over that of transformers' own cache, the first decoded token over the later ones, and these over full
attention's; CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kvcal.calibrate import load_model, make_blocks, open_data
from kvcal.runtime import compress, load

from ..shared.measure import Timer, machine
from ..shared.places import RESULTS

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


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale prefill",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model")
    parser.add_argument("artifact")
    parser.add_argument("--tokens", type=int, default=7680)
    parser.add_argument("--output", type=Path, default=RESULTS / "scale" / "prefill.json")
    options = parser.parse_args(arguments)
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
            "prefill / stock": seconds["prefill"] / stock["prefill"],
            "first / later tokens": seconds["first"] / seconds["later"],
            "wait for the first / prefill": (seconds["first"] - seconds["later"]) / seconds["prefill"],
            "later tokens / full": seconds["later"] / full["later"],
        }
        for name, seconds in found.items()
    }
    body = {
        "model": options.model,
        "tokens": options.tokens,
        "machine": machine(),
        "cpu_seconds": found,
        "ratios": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(body, indent=1) + "\n")
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
