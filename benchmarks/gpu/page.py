"""docs/results/gpu.md and its figures, from the folders that first.py and second.py wrote.

python benchmarks/gpu/page.py FOLDER...    # of one GPU or of several; several runs of one GPU are put together
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tree
from page_tables import (
    attention_table,
    baseline_table,
    build_table,
    counters_table,
    fastest,
    model_table,
    parts_table,
    selection_table,
    trace_table,
)
from results import unproven

Results = Mapping[str, Any]
Row = Mapping[str, Any]
PAGES = tree.ROOT / "docs" / "results"
LINES = {
    "dense": ("our dense", "C7", "o"),
    "loki": ("Loki", "C0", "o"),
    "clusterkv 80": ("ClusterKV, 80", "C2", "o"),
    "clusterkv 16": ("ClusterKV, 16", "C2", "s"),
    "spectral": ("spectral", "C3", "o"),
    "spectral, rows 8": ("spectral, 8-bit rows", "C3", "s"),
}
TARGETS = (("clusterkv 80", 8, 6.0), ("clusterkv 80", 1, 3.0), ("spectral", 8, 10.0), ("spectral", 1, 4.1))
"""Method, batch, times as fast as the fastest dense step at 131072 tokens."""


def read(folders: Sequence[Path]) -> list[Results]:
    """One for each GPU: {"gpu", "machine": its row, "commits", "rows"}. Of rows asked for twice one that has a time."""
    found: dict[str, dict[str, Any]] = {}
    for path in (path for folder in folders for path in sorted(folder.glob("*.json"))):
        run = json.loads(path.read_text())
        machine = next(row for row in run["rows"] if row["kind"] == "machine")
        gpu = machine.get("gpu", "no GPU")
        of = found.setdefault(gpu, {"gpu": gpu, "machine": machine, "commits": [], "rows": {}})
        of["commits"].append(str(run["commit"]))
        for row in run["rows"]:
            asked = tuple(str(row.get(name)) for name in ("kind", "check", "method", "length", "batch", "calibrated"))
            if asked not in of["rows"] or not ("failed" in row or "skipped" in row):
                of["rows"][asked] = row
    results = []
    for of in found.values():
        rows = list(of["rows"].values())
        checks = [row for row in rows if row["kind"] == "check"]
        marked = [{**row, "unproven": unproven(row, checks)} for row in rows]
        results.append({**of, "rows": marked, "commits": list(dict.fromkeys(of["commits"]))})
    return results


def write(found: Sequence[Results], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    parts = [HEAD]
    for results in found:
        name = f"gpu-{results['gpu'].lower().replace(' ', '-')}.png"
        if timed(results):
            (folder / name).write_bytes(figure(results))
        parts.append(section(results, name))
    (folder / "gpu.md").write_text("\n".join(parts))


def section(results: Results, image: str) -> str:
    machine, rows = results["machine"], results["rows"]
    by_kind = {
        kind: [row for row in rows if row["kind"] == kind] for kind in dict.fromkeys(row["kind"] for row in rows)
    }
    versions = ", ".join(f"{name} {machine.get(name)}" for name in ("driver", "torch", "triton", "transformers"))
    rates = next(iter(by_kind.get("ceilings", [])), {})
    moved = [f"a copy moves {rates['copy']:.0f} GB/s, read and written both counted"] if rates.get("copy") else []
    moved += [f"reading alone {rates['read']:.0f} GB/s"] if rates.get("read") else []
    parts = [
        f"## {results['gpu']}\n",
        f"{versions}; commit {', '.join(results['commits'])}. {verdict(by_kind.get('check', []))}\n",
        f"{'; '.join(moved) or 'The rates of the memory were not measured'}.\n",
        *([f"![attention steps]({image})\n"] if timed(results) else ["No attention step was timed.\n"]),
    ]
    attention = by_kind.get("step", []) + by_kind.get("baseline", [])
    for title, kind, table in (
        ("Attention step of one layer, µs", "step", lambda _: attention_table(attention)),
        ("What a step is made of", "parts", lambda of: PARTS + parts_table(of, attention)),
        ("Dense attention by others, µs", "baseline", lambda _: baseline_table(attention)),
        ("A step's kernels, µs", "trace", trace_table),
        ("Selection alone, µs", "selection", selection_table),
        ("Decode step of a whole model, ms", "model", model_table),
        ("Building clusters beside prefill, one layer", "build", build_table),
        ("Hardware counters", "counters", counters_table),
    ):
        if by_kind.get(kind):
            parts += [f"\n### {title}\n", table(by_kind[kind])]
    parts += ["\n### Targets\n", *targets(attention)]
    skipped = [" ".join(str(row[name]) for name in ("kind", "method", "length", "batch") if name in row)
               for row in rows if "skipped" in row]  # fmt: skip
    return "\n".join([*parts, *(["", f"Not measured: {'; '.join(skipped)}."] if skipped else [])]) + "\n"


def verdict(checks: Sequence[Row]) -> str:
    """What the gate said; what rests on a check that is not passed is marked with †."""
    wrong = [
        f"{row['check']} ({row.get('failed') or row.get('skipped') or 'wrong'})"
        for row in checks
        if not row.get("passed")
    ]
    said = f"{len(checks) - len(wrong)} of {len(checks)} checks of the kernels passed."
    return said + (f" Not passed: {', '.join(wrong)}; what rests on them is marked †." if wrong else "")


def targets(attention: Sequence[Row]) -> list[str]:
    """What was aimed at for 131072 tokens, and what came of it."""
    at = {(row["batch"], row["method"]): row for row in attention if row["length"] == 131072}
    lines = []
    for method, batch, least in TARGETS:
        row, dense = at.get((batch, method), {}), fastest(attention, 131072, batch)
        if "us" in row and dense:
            reached, mark = dense["us"] / row["us"], " †" if row["unproven"] else ""
            what = f"{method}, batch {batch}: {reached:.2f}× the fastest dense step ({dense['method']})"
            lines.append(f"- {what}, target {least:g}×.{mark}")
    return lines


def figure(results: Results) -> bytes:
    """Time of an attention step against the tokens held, a panel for the smallest and the largest batch."""
    from kvcal.calibrate.plots import png, two_panels

    drawn, axes = two_panels()
    rows = timed(results)
    batches = sorted({row["batch"] for row in rows})
    for axis, batch in zip(axes, (batches[0], batches[-1]), strict=True):
        lengths = sorted({row["length"] for row in rows if row["batch"] == batch})
        best = [row for length in lengths if (row := fastest(rows, length, batch))]
        axis.plot(*points(best), "k--", label="fastest dense")
        for method, (label, color, marker) in LINES.items():
            mine = [row for row in rows if (row["method"], row["batch"]) == (method, batch) and not row["unproven"]]
            axis.plot(*points(mine), color=color, marker=marker, markersize=4, label=label)
        axis.set(xscale="log", yscale="log", xlabel="tokens held", ylabel="µs per layer and step")
        axis.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
        axis.minorticks_off()
        axis.set_title(f"batch {batch}", fontsize=10)
        axis.legend(fontsize=8, frameon=False)
    return png(drawn, f"Attention step on {results['gpu']}")


def timed(results: Results) -> list[Row]:
    """Attention steps, ours and others'."""
    return [row for row in results["rows"] if row["kind"] in ("step", "baseline") and "us" in row]


def points(rows: Iterable[Row]) -> tuple[list[int], list[float]]:
    ordered = sorted(rows, key=lambda row: row["length"])
    return [row["length"] for row in ordered], [row["us"] for row in ordered]


HEAD = """# Speed on a GPU

Made by `python benchmarks/gpu/page.py` of what `first.py` and `second.py` beside it wrote. Llama-3-8B's shape: 8 KV
heads, 4 query heads each, head dimension 128, bfloat16; random keys and values, laid where the stores have them instead
of prefilled. Loki: rank 32, 2048 tokens, one choice for a group of query heads (`select="max"`); its index is the first
dimensions of the keys, or a tensor of its own. ClusterKV: 2048 tokens, 80 or 16 tokens per cluster, half a window open.
Spectral: 2048 tokens, one choice for a group, codes of 2 bits at rank 64 or of 4 bits at rank 32, 64 random codewords,
rows of 16 or 8 bits; it and "loki, sampled" choose by a threshold, in the kernels that attend (`kernels/scan`). Of
other methods kernels write the new token and attend to what is chosen; ClusterKV's choice is operations of torch.

Steps are replayed in a CUDA graph, over several caches in turn so that L2 holds none of what is read; medians. Ours
write the new token, project and choose; what others do is attention alone. Expected: bytes at 90 % of the rate of
reading, and a time for every launch (`benchmarks/gpu/expected.py`); arithmetic is not counted.
"""
PARTS = """Each part alone; in brackets what is expected of it, and the rate at which it moves its bytes.

"""


def main(folders: Sequence[str], pages: Path = PAGES) -> int:
    found = read([Path(folder) for folder in folders])
    if not found:
        print("error: no results there: give the folders that first.py and second.py wrote into", file=sys.stderr)
        return 2
    write(found, pages)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
