from __future__ import annotations

from typing import Any

import click

from .output import json_option, print_json
from .pass_options import PassOptions, pass_options, run_pass
from .summary import artifact_summary, print_summary


@click.command("pca")
@pass_options
@json_option
def pca_command(as_json: bool, **options: Any) -> None:
    """One pass over text: moments, PCA and score-optimal bases, and a reservoir of keys and queries.

    \b
    Example:
      calibrate pca --model mistral-7b --data wikitext --num-tokens 131072
    """
    artifact = run_pass(PassOptions(**options))
    summary = artifact_summary(artifact)
    if as_json:
        print_json(summary)
    else:
        print_summary(summary)
        click.echo(f"\nnext: calibrate analyze-rank {artifact.folder}")
