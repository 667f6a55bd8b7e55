from __future__ import annotations

from typing import Any

import click

from ..distributed import World
from .job import one_job
from .output import json_option, print_json, print_lines
from .pass_options import PassOptions, pass_options, run_pass
from .summary import artifact_summary, print_summary


@click.command("pca")
@pass_options
@json_option
@one_job
def pca_command(as_json: bool, world: World, **options: Any) -> None:
    """One pass over text: moments, PCA and score-optimal bases, a reservoir of keys, queries and values, its codebooks.

    \b
    Example:
      calibrate pca --model mistral-7b --data wikitext --num-tokens 131072
      torchrun --nproc-per-node 8 -m kvcal.calibrate pca --model mistral-7b --data wikitext
    """
    artifact = run_pass(PassOptions(**options), world)
    summary = artifact_summary(artifact)
    if as_json:
        print_json(summary)
    else:
        print_summary(summary)
        print_lines("", f"next: calibrate analyze-rank {artifact.folder}")
