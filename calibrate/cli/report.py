from __future__ import annotations

from pathlib import Path

import click

from .options import artifact_argument
from .output import NewFile, json_option, print_lines, print_result, working


def _is_report(path: Path) -> bool:
    from ..reports.page import is_report

    return is_report(path)


@click.command("report")
@artifact_argument()
@click.argument("results", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=NewFile(_is_report, "a report", ".html"),
    default="report.html",
    show_default=True,
    help="Write the page to this file; an earlier report there is replaced, anything else is left.",
)
@json_option
def report_command(artifact: Path, results: tuple[Path, ...], output: Path, as_json: bool) -> None:
    """Write one HTML page about ARTIFACT that needs no network.

    It shows ranks, spectra, quality against bytes, the plan and provenance. RESULTS are files that `calibrate evaluate
    --output` wrote: quality and answers are read from them and from the predictions beside them.

    \b
    Example:
      calibrate report mistral-7b-wikitext results.json -o report.html
    """
    from ...artifacts import load
    from ...artifacts.writing import write_atomically
    from ..reports import report

    with working("checking hashes"):
        found = load(artifact)
    with working("drawing"):
        page = report(found, results)
    write_atomically(output, page.encode())
    print_result(as_json, {"report": str(output)}, lambda: print_lines(f"report: {output}"), output)
