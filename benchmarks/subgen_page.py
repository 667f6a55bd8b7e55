"""docs/results/subgen.md, from what benchmarks/subgen.py measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from subgen_error import SEEDS, STEPS


def page(found: Mapping[str, Any]) -> str:
    ablations, bound, cost = found["ablations"], found["bound"], found["cost"]
    parts = [HEAD.format(**found["text"]), MEMORY, "## Parameters, one at a time\n"]
    rows = [["parameter", "value", "error", "by layer", "held", "clusters"]]
    for name, entry in ablations["of_default"].items():
        rows.append(["defaults, the paper's normaliser", f"delta of the {name}", *cells(entry)])
    for name, entries in ablations["by"].items():
        for entry in entries:
            mark = " (default)" if entry[name] == ablations["default"][name] else ""
            rows.append([name, f"{entry[name]}{mark}", *cells(entry)])
    parts += [table(rows), "\n## The same bytes, otherwise\n", OTHERWISE]
    rows = [["budget", "of 4096 tokens", "way", "error", "by layer"]]
    for entry in found["alternatives"]:
        rows.append([entry["budget"], str(entry["tokens"]), entry["way"], *cells(entry)[:2]])
    parts += [table(rows), "\n## The paper's bound\n"]
    ratio = ", ".join(f"{name} {value:.3f}" for name, value in bound["ratio"].items())
    exponents = [value for layer in bound["layers"] for value in layer["delta_r"]]
    parts.append(
        BOUND.format(ratio=ratio, least=min(exponents), most=max(exponents), factor=math.exp(2 * min(exponents)))
    )
    parts += ["## Cost\n", COST.format(**cost)]
    return "\n".join(parts)


def cells(entry: Mapping[str, Any]) -> list[str]:
    layers = " ".join(f"{value:.3f}" for value in entry["error_by_layer"])
    more = [f"{entry['resident']:.3f}", f"{entry['open_clusters']:.1f}"] if "resident" in entry else []
    return [f"{entry['error']:.3f}", layers, *more]


def table(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


HEAD = f"""# SubGen on the demo model

*The demo model's figures, which do not carry over to real ones: [real.md](real.md).*

Made by `python benchmarks/subgen.py`. error: mean of ‖o − o_dense‖ / ‖o_dense‖ of the attention output, over the last
{STEPS} tokens of {{blocks}} held-out blocks of {{tokens}} tokens and over {len(SEEDS)} seeds, after everything
before them was prefilled; teacher-forced, so layers do not see one another's errors. held: bytes as a fraction of all
keys and values. clusters: mean per KV head.
"""
MEMORY = """## Memory

![memory](subgen-memory.png)

Of the demo model: its keys on held-out text, in blocks of 4096 tokens that begin at position 0 each, one after the
other; delta without a cap is 0.75 of the radius that 64 greedy centers need on the first block, by KV head. Made keys:
64 lumps of gaussian noise of 0.25 around gaussian centers, or gaussian alone, delta 5.
"""
OTHERWISE = """Sinks and window as SubGen's at that budget, and what else is held:

- greedy k-center: SubGen's estimators, clusters made from all keys at once
- one cluster: SubGen's numerator; the normaliser from uniform samples of all keys, as many as fit
- values for both: `normaliser="values"`, tokens drawn by ‖v‖², as many as fit, in numerator and normaliser
- uniform tokens: the same, drawn uniformly without replacement
- streaming, h2o: all bytes for tokens
"""
BOUND = """Error as a multiple of sqrt(Dv / s) ‖softmax(Kq)‖₂ ‖V‖_op, constants left out: {ratio}.
The bound also wants t ≥ e^(2 δ r) ln n / ε². Measured δ·r (with the softmax scale): {least:.1f} to {most:.1f} by layer
and head, that is at least a factor of {factor:.2g}: these keys are not clusterable in the sense of the paper, and the
samples per cluster bound nothing here.
"""
COST = """One thread, seconds over all layers and blocks: dense attention of the prompts {dense_prefill:.2f}, their way
into the sketch {into_the_sketch:.2f}, a ratio of {ratio:.2f}. A decoded token (update and attention) takes
{step:.2g} s per layer.
"""
