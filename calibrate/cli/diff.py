from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import artifact_argument
from .output import json_option, print_lines, print_result, print_table


@click.command("diff")
@artifact_argument("first")
@artifact_argument("second")
@click.option(
    "--variance",
    type=float,
    default=0.9,
    help="Compare subspaces that hold this fraction of the variance in FIRST, in (0, 1].",
)
@json_option
def diff_command(first: Path, second: Path, variance: float, as_json: bool) -> None:
    """Show how far two artifacts lie apart.

    Compared are key subspaces, ranks, spectra, and settings.

    \b
    Example:
      calibrate diff mistral-7b-wikitext mistral-7b-c4
    """
    from ...artifacts import load
    from ..compare import compare

    report = compare(load(first), load(second), variance)
    print_result(as_json, report, lambda: _print(report))


def _print(report: dict[str, Any]) -> None:
    for entry in report["differs"]:
        print_lines(f"{entry['field']}: {_short(entry['first'])} -> {_short(entry['second'])}")
    only = {side: ", ".join(report[f"only_{side}"]) for side in ("first", "second")}
    for side, stages in only.items():
        if stages:
            print_lines(f"only in {side.upper()}: {stages}")
    if report["same_in_both"]:
        print_lines("the tensor files" + " of all other stages" * any(only.values()) + " are identical")
        return
    rows = []
    for entry in report["layers"]:
        for quantity in ("key_pre", "key_post"):
            heads = entry[quantity]
            rows.append(
                [
                    f"{entry['layer']}{'*' * bool(entry['window'])} {quantity}",
                    " ".join(map(str, heads["rank"])),
                    " ".join(f"{change:+d}" for change in heads["rank_change"]),
                    " ".join(f"{overlap:.3f}" for overlap in heads["overlap"]),
                    " ".join(f"{angle:.1f}" for angle in heads["largest_angle"]),
                    " ".join(f"{100 * change:.1f}" for change in heads["spectrum_change"]),
                ]
            )
    header = ["layer", "rank", "change", "subspace overlap", "largest angle (°)", "spectrum change (%)"]
    print_table(f"key subspaces of rank@{100 * report['variance']:g}, by KV head", header, rows)
    if any(entry["window"] for entry in report["layers"]):
        print_lines("* sliding window, which methods leave alone")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "…"
