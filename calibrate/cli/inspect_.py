from __future__ import annotations

from pathlib import Path

import click

from .options import artifact_argument
from .output import json_option, print_result
from .summary import artifact_summary, print_summary, say_small_sample


@click.command("inspect")
@artifact_argument()
@json_option
def inspect_command(artifact: Path, as_json: bool) -> None:
    """Show what ARTIFACT is: model, text, settings, stages and hashes.

    \b
    Example:
      calibrate inspect mistral-7b-wikitext
    """
    from ...artifacts import load

    found = load(artifact)
    say_small_sample(found)
    summary = artifact_summary(found)
    print_result(as_json, summary, lambda: print_summary(summary))
