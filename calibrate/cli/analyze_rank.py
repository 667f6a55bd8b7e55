from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .job import one_job
from .options import artifact_argument
from .output import json_option, plot_option, print_lines, print_result, print_table, write_plot
from .pass_options import PassOptions, pass_options, run_pass
from .summary import say_small_sample

if TYPE_CHECKING:
    from ..distributed import World


@click.command("analyze-rank")
@artifact_argument(required=False)
@click.option("--variance", type=float, default=0.9, help="Reach this fraction of the variance, in (0, 1].")
@plot_option
@pass_options
@json_option
@one_job
def analyze_rank_command(
    artifact: Path | None, variance: float, plot: Path | None, as_json: bool, world: World, **options: Any
) -> None:
    """Show rank@p of keys, queries and values by layer and head.

    It is the number of dimensions that hold a fraction p of the variance, and is computed from ARTIFACT alone.

    With --model and --data instead of ARTIFACT, the calibration pass comes first. Layers with a sliding window are
    marked and left out of the means: methods leave them alone.

    \b
    Example:
      calibrate analyze-rank mistral-7b-wikitext --variance 0.9 --plot rank.png
    """
    from ...artifacts import load
    from ..plots import rank_figure
    from ..rank import check_variance, rank_report

    check_variance(variance)
    given = PassOptions(**options)
    if artifact is not None and (given.model_spec or given.data_spec):
        raise click.UsageError("give either ARTIFACT or --model and --data, not both")
    if artifact is None and not (given.model_spec and given.data_spec):
        raise click.UsageError("give an ARTIFACT folder, or --model and --data to calibrate first")
    found = load(artifact) if artifact is not None else run_pass(given, world)
    world.leave_to_first()
    if artifact is not None:
        say_small_sample(found)
    report = rank_report(found, variance)
    print_result(as_json, report, lambda: print_ranks(report))
    if plot is not None:
        write_plot(plot, rank_figure(found, report))


def print_ranks(report: dict[str, Any]) -> None:
    """One row per layer, each cell the ranks of the KV heads; then the means over layers with full attention."""
    from ...artifacts import QUANTITIES
    from ..rank import means_are_of

    columns = [*QUANTITIES, "key_pre_uncentred", "key_post_uncentred"]
    rows = [
        [f"{entry['layer']}{'*' * bool(entry['window'])}", *(_heads(entry[name]) for name in columns)]
        for entry in report["layers"]
    ]
    rows.append(["mean", *(f"{report['model'][name]:.1f}" for name in columns)])
    rows.append(["participation", *(f"{report['participation'][name]:.1f}" for name in columns)])
    print_table(f"rank@{100 * report['variance']:g} by layer and KV head", ["layer", *columns], rows)
    if note := means_are_of(report):
        print_lines(f"* sliding window; {note}")


def _heads(ranks: list[int]) -> str:
    if len(ranks) <= 3:
        return " ".join(map(str, ranks))
    return f"{min(ranks)}–{max(ranks)}"
