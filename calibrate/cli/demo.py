from __future__ import annotations

from pathlib import Path

import click

from ...artifacts import load, save
from .analyze_rank import print_ranks
from .cluster import print_clusters
from .output import json_option, print_json, progress_bar
from .pass_options import PassOptions, run_pass
from .summary import artifact_summary, print_summary

NUM_TOKENS = 131072


@click.command("demo")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("kvcal-demo"),
    show_default=True,
    help="Folder of the artifact.",
)
@json_option
def demo_command(output: Path, as_json: bool) -> None:
    """All of it on the built-in model and text, without a network: pca, analyze-rank, cluster, verify.

    \b
    Example:
      calibrate demo --output /tmp/demo
    """
    from ..card import card_files
    from ..checkpoint import Checkpoint
    from ..cluster_stage import cluster, cluster_report
    from ..plots import cluster_figure
    from ..rank import rank_report

    options = PassOptions(
        model_spec="demo",
        data_spec="stdlib",
        output=output,
        num_tokens=NUM_TOKENS,
        seq_len=2048,
        batch_size=None,
        split=None,
        seed=0,
        reservoir=4096,
        device="cpu",
        dtype="auto",
        uncentred=False,
        resume=Checkpoint.beside(output, "").exists(),
    )
    artifact = run_pass(options)
    if "clusters" not in artifact.stages:
        with progress_bar("clustering") as progress:
            clustered = cluster(artifact, progress=progress)
        figures = {"clusters.png": cluster_figure(clustered, cluster_report(clustered))}
        artifact = save(clustered, output, {**card_files(clustered), **figures})
    verified = load(output)
    ranks, clusters = rank_report(verified), cluster_report(verified)
    if as_json:
        print_json({"artifact": artifact_summary(verified), "ranks": ranks, "clusters": clusters})
        return
    print_summary(artifact_summary(verified))
    click.echo()
    print_ranks(ranks)
    click.echo()
    print_clusters(clusters)
    click.echo(f"\nverified: every hash, shape and dtype of {output} holds")
    click.echo(f"figures:  {output / 'rank.png'}  {output / 'clusters.png'}")
    click.echo(f"next:     calibrate inspect {output}    or    calibrate pca --model MODEL --data TEXT")
