"""Bytes of a calibration's state, and the arithmetic of one of a model of 70B: a projection on stated assumptions."""

from __future__ import annotations

from typing import Any

QUANTITIES = 5
"""key pre and post, query pre and post, value: a mean and a D×D scatter each."""
SAMPLED = 3
"""key post, query post, value."""

LLAMA_70B = {"parameters": 70.6e9, "layers": 80, "query_heads": 64, "kv_heads": 8, "head_dim": 128, "hidden": 8192}
GPUS, TOKENS, SEQ_LEN, RESERVOIR = 8, 1_000_000, 2048, 4096
PEAK, UTILISATION, FLOAT64_PEAK, FLOAT64_UTILISATION = 989e12, 0.35, 67e12, 0.35
LINK = 5e9


def state_bytes(kv_heads: int, head_dim: int, reservoir: int, element: int) -> dict[str, int]:
    """Of one layer; `element` is the size of the activations' dtype."""
    return {
        "moments": QUANTITIES * kv_heads * (head_dim * head_dim + head_dim) * 8,
        "rows": SAMPLED * kv_heads * reservoir * head_dim * element,
    }


def projection() -> dict[str, float]:
    """FLOP, seconds and bytes for TOKENS tokens on GPUS GPUs."""
    shape = LLAMA_70B
    forward = 2 * shape["parameters"] * TOKENS
    attention = 2 * shape["layers"] * TOKENS * SEQ_LEN * shape["query_heads"] * shape["head_dim"]
    samples = 2 * shape["query_heads"] + 3 * shape["kv_heads"]
    scatter = 2 * shape["layers"] * TOKENS * samples * shape["head_dim"] ** 2
    state = state_bytes(shape["kv_heads"], shape["head_dim"], RESERVOIR, element=2)
    held = shape["layers"] * (state["moments"] + state["rows"])
    seconds = {
        "passing": (forward + attention) / (GPUS * PEAK * UTILISATION),
        "moments": scatter / (GPUS * FLOAT64_PEAK * FLOAT64_UTILISATION),
        "gathering": held / LINK,
    }
    return {
        "forward": forward,
        "attention": attention,
        "scatter": scatter,
        "held": held,
        "held_moments": shape["layers"] * state["moments"],
        **seconds,
        "seconds": sum(seconds.values()),
    }


def assumed() -> dict[str, Any]:
    """What the projection rests on, by the names of this file."""
    return {
        "gpus": GPUS,
        "tokens": TOKENS,
        "seq_len": SEQ_LEN,
        "reservoir": RESERVOIR,
        "peak": PEAK,
        "utilisation": UTILISATION,
        "float64_peak": FLOAT64_PEAK,
        "float64_utilisation": FLOAT64_UTILISATION,
        "link": LINK,
    }
