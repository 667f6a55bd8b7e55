"""The page of `scale.py`: what it measured, and the projection with its arithmetic."""

# ruff: noqa: E501 (rows of tables)
from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping
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


def page(measured: Mapping[str, Any]) -> str:
    return "\n".join([_head(), _throughput(measured), _state(measured["state"]), _projection()])


def _head() -> str:
    return _text("""
        # Calibration on several processes: throughput, bytes, a projection

        Written by `python benchmarks/scale.py`. How to start several processes, and what they guarantee, is in
        [scale.md](../scale.md).
    """)


def _throughput(measured: Mapping[str, Any]) -> str:
    machine = measured["machine"]
    rows = "\n        ".join(
        f"| {name} | {found['one']:.2f} | {found['two']:.2f} | {statistics.median(found['ratios']):.2f} "
        f"({found['ratios'][0]:.2f} to {found['ratios'][-1]:.2f}) |"
        for name, found in (("wall", measured["clocks"]["wall"]), ("CPU, of the busiest", measured["clocks"]["cpu"]))
    )
    return _text(f"""
        ## Throughput of 2 processes over 1

        The demo model over {measured["blocks"]} blocks of {measured["seq_len"]} tokens, one thread per process, from when
        all processes are ready until the last has done its share: no start, no loading, no merging. Runs with 1 and 2
        processes alternated; {measured["rounds"]} rounds after one that does not count.

        | clock | 1 process, median seconds | 2 processes | ratio, median of the rounds (range) |
        | --- | --- | --- | --- |
        {rows}

        On {machine["cpu"]}, {machine["cores"]} cores that other work shared: the wall's ratio moves with that work, either
        way. CPU time hardly does: it says how evenly the work is dealt, and not what two processes lose to each other's
        use of the memory beyond what a core counts as its own time. Not measured here: GPUs, several nodes.
    """)


def _state(state: Mapping[str, Any]) -> str:
    large = state_bytes(LLAMA_70B["kv_heads"], LLAMA_70B["head_dim"], RESERVOIR, element=2)
    layers = LLAMA_70B["layers"]
    each = large["moments"] + large["rows"]
    return _text(f"""
        ## Bytes of state per layer

        `5 · Hkv · (D² + D) · 8` for the moments (float64; keys and queries before and after the rotary embedding, values)
        and `3 · Hkv · N · D · e` for the reservoir of N tokens in activations of e bytes. Nothing grows with the text.

        | model | Hkv | D | N | e | moments | reservoir | by the formula | measured |
        | --- | --- | --- | --- | --- | --- | --- | --- | --- |
        | demo | {state["kv_heads"]} | {state["head_dim"]} | {state["reservoir"]} | 4 | {state["moments"]:,} | {state["rows"]:,} | {state["moments"] + state["rows"]:,} | {state["bytes"]:,} |
        | Llama-3-70B | 8 | 128 | {RESERVOIR} | 2 | {large["moments"]:,} | {large["rows"]:,} | {each:,} | not measured |

        Llama-3-70B in all: {layers} layers · {each / 1e6:.1f} MB = {layers * each / 1e9:.2f} GB per process and per
        checkpoint, of which {layers * large["moments"] / 1e9:.2f} GB are moments. With `--tp` a process has its heads
        only: an eighth of it on 8.
    """)


def _projection() -> str:
    p = LLAMA_70B
    forward = 2 * p["parameters"] * TOKENS
    attention = 2 * p["layers"] * TOKENS * SEQ_LEN * p["query_heads"] * p["head_dim"]
    seconds = (forward + attention) / (GPUS * PEAK * UTILISATION)
    samples = 2 * p["query_heads"] + 3 * p["kv_heads"]
    scatter = 2 * p["layers"] * TOKENS * samples * p["head_dim"] ** 2
    moments = scatter / (GPUS * FLOAT64_PEAK * FLOAT64_UTILISATION)
    state = state_bytes(p["kv_heads"], p["head_dim"], RESERVOIR, element=2)
    whole = p["layers"] * (state["moments"] + state["rows"])
    gather = whole / LINK
    total = seconds + moments + gather
    return _text(f"""
        ## Llama-3-70B on 1M tokens on 8 GPUs: a projection, not a measurement

        Assumed: {p["parameters"] / 1e9:.1f}B parameters, {p["layers"]} layers, {p["query_heads"]} query and {p["kv_heads"]}
        KV heads of {p["head_dim"]} dimensions; bfloat16 weights ({2 * p["parameters"] / 1e9:.0f} GB: more than one GPU of
        80 GB holds, hence `--tp` on 8); blocks of {SEQ_LEN} tokens; GPUs of {PEAK / 1e12:.0f} TFLOP/s dense in bfloat16 and
        {FLOAT64_PEAK / 1e12:.0f} in float64 (an H100 SXM's data sheet, tensor cores), of which {UTILISATION:.0%} and
        {FLOAT64_UTILISATION:.0%} are reached (a guess; tensor parallelism with small batches can reach less);
        {LINK / 1e9:.0f} GB/s between processes through CPU memory (a guess).

        | part | arithmetic | result |
        | --- | --- | --- |
        | weights of the forward pass | 2 · {p["parameters"] / 1e9:.1f}e9 · 1e6 | {forward:.2e} FLOP |
        | attention, causal | 4 · {p["layers"]} · 1e6 · ({SEQ_LEN} / 2) · {p["query_heads"]} · {p["head_dim"]} | {attention:.2e} FLOP |
        | time of both | ({forward:.2e} + {attention:.2e}) / (8 · {PEAK:.2e} · {UTILISATION}) | {seconds:.0f} s |
        | scatter matrices, float64 | 2 · {p["layers"]} · 1e6 · (2 · {p["query_heads"]} + 3 · {p["kv_heads"]}) · {p["head_dim"]}² | {scatter:.2e} FLOP |
        | their time | {scatter:.2e} / (8 · {FLOAT64_PEAK:.2e} · {FLOAT64_UTILISATION}) | {moments:.1f} s |
        | heads gathered to every process | {whole / 1e9:.2f} GB / ({LINK / 1e9:.0f} GB/s) | {gather:.1f} s |
        | sum |  | {total:.0f} s = {8 * total / 3600:.2f} GPU hours |

        Left out, since nothing here says what they cost: loading {2 * p["parameters"] / 1e9:.0f} GB of weights, hashing them
        (one process's CPU and disk), reading and tokenising the text, the second projection of queries and keys where
        rotating back does not apply, copying sampled rows to the CPU, the eigen-decompositions at the end
        ({p["layers"]} layers · {p["kv_heads"]} heads of 128 × 128), and checkpoints (at most a twentieth of the time unless
        `--checkpoint-blocks` asks for more).
    """)


def _text(text: str) -> str:
    return textwrap.dedent(text).strip() + "\n"
