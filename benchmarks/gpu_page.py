"""docs/results/gpu.md and its figures, from what benchmarks/gpu.py measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_page_tables import attention_table, baseline_table, build_table, model_table, parts_table, selection_table

Results = Mapping[str, Any]
Row = Mapping[str, Any]
LINES = {
    "dense": ("our dense", "C7", "o"),
    "loki": ("Loki", "C0", "o"),
    "loki, int4": ("Loki, int4", "C0", "s"),
    "loki, int2": ("Loki, int2, r 64", "C0", "^"),
    "clusterkv 80": ("ClusterKV, 80", "C2", "o"),
    "clusterkv 16": ("ClusterKV, 16", "C2", "s"),
    "spectral, int4": ("spectral, int4", "C3", "s"),
    "spectral, int2": ("spectral, int2, r 64", "C3", "^"),
}

SPECTRAL = ("spectral, int4", "spectral, int2", "spectral, int4, flat", "spectral, int2, flat")


def write(found: Sequence[Results], folder: Path) -> None:
    """Args: found: of one GPU each."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [HEAD]
    for results in found:
        name = f"gpu-{slug(results)}.png"
        (folder / name).write_bytes(figure(results))
        parts.append(section(results, name))
    (folder / "gpu.md").write_text("\n".join(parts))


def slug(results: Results) -> str:
    return results["machine"]["gpu"].lower().replace(" ", "-")


def section(results: Results, image: str) -> str:
    machine, rates, checks = results["machine"], results["ceilings"], results["gate"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("driver", "torch", "triton", "transformers"))
    parts = [
        f"## {machine['gpu']}\n",
        f"{versions}; commit {results['commit']}. {len(checks)} checks of the kernels passed first. A copy moves "
        f"{rates['copy']:.0f} GB/s, read and written both counted; reading alone {rates['read']:.0f} GB/s.\n",
        f"![attention steps]({image})\n",
        "### Attention step of one layer, µs\n",
        attention_table(results["attention"]),
        "\n### What a step is made of\n",
        PARTS,
        parts_table(results["attention"]),
        "\n### Dense attention by others, µs\n",
        baseline_table(results["attention"]),
    ]
    for title, key, make in (
        ("Selection alone, µs", "selection", selection_table),
        ("Decode step of a whole model, ms", "model", model_table),
        ("Building clusters beside prefill, one layer", "build", build_table),
    ):
        if results[key]:
            parts += [f"\n### {title}\n", make(results[key])]
    parts += ["\n### Targets\n", *targets(results)]
    if results["skipped"]:
        parts += ["", f"Not measured: {'; '.join(results['skipped'])}."]
    return "\n".join(parts) + "\n"


def targets(results: Results) -> list[str]:
    """What was aimed at for 131072 tokens, and what came of it."""
    at = {(row["batch"], row["method"]): row for row in results["attention"] if row["length"] == 131072}
    lines = []
    for wanted, batch, method, least in (
        ("Loki int4, batch 8", 8, "loki, int4", 4.0),
        ("ClusterKV, batch 8", 8, "clusterkv 80", 6.0),
        ("Loki int4, batch 1", 1, "loki, int4", 3.0),
        ("ClusterKV, batch 1", 1, "clusterkv 80", 3.0),
        *((f"{name}, batch 8", 8, name, 8.0) for name in SPECTRAL),
        *((f"{name}, batch 1", 1, name, 4.0) for name in SPECTRAL),
    ):
        row, dense = at.get((batch, method), {}), fastest(results["attention"], 131072, batch)
        if "us" in row and dense:
            reached = dense["us"] / row["us"]
            lines.append(f"- {wanted}: {reached:.2f}× the fastest dense step ({dense['method']}), target {least:g}×.")
    for batch in (1, 8):
        row, dense = at.get((batch, "loki, int4"), {}), fastest(results["attention"], 131072, batch)
        if "us" not in row or not dense:
            continue
        for part in ("score", "attend"):
            reached = row["parts"][part]["of_copy"]
            lines.append(f"- {part}, int4, batch {batch}: {reached:.0%} of the copy's rate, target 80 %.")
        share = row["parts"]["select"]["us"] / dense["us"]
        lines.append(f"- select, batch {batch}: {share:.2f} of the fastest dense step, target 0.25.")
    return lines


def fastest(rows: Iterable[Row], length: int, batch: int) -> Row | None:
    """Of all that read everything, ours included."""
    timed = [row for row in rows if row["dense"] and "us" in row and (row["length"], row["batch"]) == (length, batch)]
    return min(timed, key=lambda row: row["us"], default=None)


def figure(results: Results) -> bytes:
    """Time of an attention step against the tokens held, a panel for the smallest and the largest batch."""
    from kvcal.calibrate.plots import png, two_panels

    drawn, axes = two_panels()
    rows = results["attention"]
    batches = sorted({row["batch"] for row in rows})
    for axis, batch in zip(axes, (batches[0], batches[-1]), strict=True):
        lengths = sorted({row["length"] for row in rows if row["batch"] == batch})
        best = [row for length in lengths if (row := fastest(rows, length, batch))]
        axis.plot([row["length"] for row in best], [row["us"] for row in best], "k--", label="fastest dense")
        for method, (label, color, marker) in LINES.items():
            mine = [row for row in rows if (row["method"], row["batch"]) == (method, batch) and "us" in row]
            mine.sort(key=lambda row: row["length"])
            points = [row["length"] for row in mine], [row["us"] for row in mine]
            axis.plot(*points, color=color, marker=marker, markersize=4, label=label)
        axis.set(xscale="log", yscale="log", xlabel="tokens held", ylabel="µs per layer and step")
        axis.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
        axis.minorticks_off()
        axis.set_title(f"batch {batch}", fontsize=10)
        axis.legend(fontsize=8, frameon=False)
    return png(drawn, f"Attention step on {results['machine']['gpu']}")


HEAD = """# Speed on a GPU

Made by `python benchmarks/gpu.py`. Llama-3-8B's shape: 8 KV heads, 4 query heads each, head dimension 128, bfloat16;
random keys and values, laid where the stores have them instead of prefilled. Loki: rank 32 (64 in int2: as many bytes
as int4), 2048 tokens, one choice for a group of query heads (`select="max"`); its index is the first dimensions of the
keys, a tensor of its own, or codes of 4 or 2 bits of its own (made of kernels in the benchmark, not yet a method of the
runtime). ClusterKV: 2048 tokens, 80 or 16
tokens per cluster, half a window open. Spectral: rank 32 in int4 or 64 in int2, 32 tokens per cluster, one choice for a
group, a tail; an eighth of the clustered tokens refined, or (flat) all codes read and no cluster's.

Steps are replayed in a CUDA graph, over several caches in turn so that L2 holds none of what is read; medians. Ours
write the new token, project and choose; what others do is attention alone.
"""
PARTS = """At 131072 tokens, or the longest below: the step in one, each part alone, and what the step does besides its
parts (the rest: budgets, rotations). In brackets the share of the copy's rate at which a part moves its bytes.
"""
