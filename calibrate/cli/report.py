from __future__ import annotations

from pathlib import Path

import click

from ...artifacts import load
from ...artifacts.writing import write_atomically
from .output import NewFile, say, working


def _is_report(path: Path) -> bool:
    from ..report.page import is_report

    return is_report(path)


@click.command("report")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("results", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=NewFile(_is_report, "a report", ".html"),
    default="report.html",
    show_default=True,
    help="File of the page; an earlier report there is replaced.",
)
def report_command(artifact: Path, results: tuple[Path, ...], output: Path) -> None:
    """One HTML page about ARTIFACT that needs no network: ranks, spectra, quality against bytes, plan and provenance.

    RESULTS are files that `calibrate evaluate --output` wrote: quality and answers are read from them and from the
    predictions beside them.

    \b
    Example:
      calibrate report mistral-7b-wikitext results.json -o report.html
    """
    from ..report import report

    with working("checking hashes"):
        found = load(artifact)
    with working("drawing"):
        page = report(found, results)
    write_atomically(output, page.encode())
    say(f"report: {output}")
