"""The JSON of a run: its rows as they were asked for, with what was found, and the checks that a row rests on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
CHECKED = {
    "dense": ("append", "dense"),
    "full": ("append", "dense"),
    "loki": ("append", "score", "select", "attend"),
    "clusterkv": ("append", "attend"),
    "spectral": (),
}
"""By a method's first word: what its step launches."""
VERSIONS = ("gpu", "driver", "torch", "triton", "transformers", "file")


def save(results: Mapping[str, Any], path: Path) -> None:
    """Whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)


def rests_on(row: Row) -> tuple[str, ...]:
    """The checks without which a time says nothing."""
    if row["kind"] == "build":
        return ("cluster",)
    if row["kind"] == "selection":
        return () if row["method"] == "torch.topk" else ("select",)
    if row["kind"] not in ("step", "parts", "trace", "model", "counters"):
        return ()
    method = row["method"].replace("full", "dense")
    return (*CHECKED[method.replace(",", " ").split()[0]], f"step {method}")


def unproven(row: Row, checks: Iterable[Row]) -> list[str]:
    """Of the checks it rests on, those that failed or did not end."""
    passed = {check["check"]: bool(check.get("passed")) for check in checks}
    return [name for name in rests_on(row) if not passed.get(name)]


def brief(row: Row) -> str:
    """A row as it is printed; all of it is in the JSON."""
    said = [" ".join(str(row[name]) for name in ("kind", "check", "method") if name in row)]
    said += [f"{row[name]} tokens" for name in ("length",) if name in row]
    said += [f"batch {row['batch'] or 'as many as fit'}" for name in ("batch",) if name in row]
    said += ["calibrated"] if row.get("calibrated") else []
    try:
        return f"{', '.join(said)}: {'; '.join(outcome(row))}"
    except (LookupError, TypeError, ValueError, AttributeError):  # what is printed never ends a run
        return f"{', '.join(said)}: {json.dumps(row)[:300]}"


def outcome(row: Row) -> list[str]:
    said = [*verdict(row), *times(row), *(f"{name} {row[name]}" for name in VERSIONS if name in row)]
    if "parts" in row:
        parts = row["parts"].items()
        said.append(", ".join(f"{name} {number(of.get('us'))} ({number(of['expected_us'])})" for name, of in parts))
    if "kernels" in row:
        longest = sorted(row["kernels"].items(), key=lambda item: -item[1]["n"] * item[1]["us"])[:12]
        said += [f"\n    {of['n']:g} × {of['us']:.1f} µs, gap {of['gap']:.1f}: {name}" for name, of in longest]
    said += [f"{name}: {row[name]}" for name in ("failed", "skipped", "note", "why_not_captured") if row.get(name)]
    said += [f"UNPROVEN: {', '.join(row['unproven'])}"] if row.get("unproven") else []
    return said or ["done"]


def verdict(row: Row) -> list[str]:
    if row["kind"] not in ("check", "sanitizer"):
        return []
    said = ["no verdict" if row.get("passed") is None else "right" if row["passed"] else "WRONG"]
    if isinstance(row.get("found"), list):
        said.append(f"{len(row['found'])} compared, worst {row['worst']:.2f} of what is allowed")
        wrong = [of for of in row["found"] if not of["passed"]]
        said += [f"{of['check']} {number(of['error'])} > {of['allowed']:.2g}" for of in wrong[:3]]
    return said


def times(row: Row) -> list[str]:
    """What was measured, and beside it what was expected."""
    said = [f"{row['us']:.1f} µs"] if "us" in row else []
    said += [f"{row['ms']:.2f} ms, {row['tokens_per_s']:.0f} tokens/s"] if "ms" in row else []
    said += [f"{row['build_ms']:.1f} ms, prefill {row['prefill_ms']:.1f}"] if "build_ms" in row else []
    said += [f"{name} {row[name]:.0f} GB/s" for name in ("copy", "read") if row.get(name)]
    if "expected_us" in row:
        long = row["kind"] in ("model", "build")
        expected = f"{row['expected_us'] / 1000:.2f} ms" if long else f"{row['expected_us']:.1f} µs"
        said.append(f"expected {expected} ({row['launches_expected']} launches, {row['bytes'] / 1e6:.1f} MB)")
    return said


def number(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}" if value < 1 else f"{value:.1f}"
