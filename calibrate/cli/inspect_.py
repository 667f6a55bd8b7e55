from __future__ import annotations

from pathlib import Path

import click

from ...artifacts import load
from .output import json_option, print_json
from .summary import artifact_summary, print_summary


@click.command("inspect")
@click.argument("artifact", type=click.Path(path_type=Path))
@json_option
def inspect_command(artifact: Path, as_json: bool) -> None:
    """Show what ARTIFACT is: model, text, settings, stages, hashes.

    \b
    Example:
      calibrate inspect mistral-7b-wikitext
    """
    summary = artifact_summary(load(artifact))
    if as_json:
        print_json(summary)
    else:
        print_summary(summary)
