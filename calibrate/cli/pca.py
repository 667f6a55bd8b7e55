from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .job import one_job
from .output import json_option, print_result
from .pass_options import PassOptions, pass_options, run_pass
from .summary import artifact_summary, print_summary

if TYPE_CHECKING:
    from ..distributed import World


@click.command("pca")
@pass_options
@json_option
@one_job
def pca_command(as_json: bool, world: World, **options: Any) -> None:
    """Calibrate a model in one pass over text.

    The artifact has the moments of keys, queries and values, PCA and score-optimal bases, a sample of them, and
    codebooks of that.

    \b
    Example:
      calibrate pca --model mistral-7b --data wikitext --num-tokens 128k
      torchrun --nproc-per-node 8 -m kvcal.calibrate pca --model mistral-7b --data wikitext
    """
    artifact = run_pass(PassOptions(**options), world)
    summary = artifact_summary(artifact)
    step = f"next: calibrate analyze-rank {artifact.folder}"
    print_result(as_json, summary, lambda: print_summary(summary), artifact.folder, step)
