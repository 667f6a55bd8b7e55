from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ...artifacts import load, save
from ...artifacts.places import check_can_write_in
from ..distributed import World
from .job import one_job
from .output import json_option, plot_option, print_json, print_lines, print_table, progress_bar, write_plot


@click.command("cluster")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--clusters", type=click.IntRange(1), help="Clusters per KV head; overrides --tokens-per-cluster.")
@click.option("--tokens-per-cluster", type=click.IntRange(1), default=32, show_default=True)
@click.option("--metric", type=click.Choice(["cosine", "l2"]), default="cosine", show_default=True)
@click.option("--iterations", type=click.IntRange(1), default=20, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@plot_option
@json_option
@one_job
def cluster_command(artifact: Path, plot: Path | None, as_json: bool, world: World, **settings: Any) -> None:
    """Cluster the sampled keys per layer and KV head (faiss k-means); adds the stage `clusters` to ARTIFACT.

    \b
    Example:
      calibrate cluster mistral-7b-wikitext --tokens-per-cluster 32 --plot clusters.png
    """
    from ..card import card_files
    from ..cluster_stage import cluster, cluster_report
    from ..plots import cluster_figure

    found = load(artifact)
    check_can_write_in(artifact)
    world.agree_on({"content of ARTIFACT": str(found.content_hash)})
    with progress_bar("clustering") as progress:
        clustered = cluster(found, **settings, progress=progress, world=world)
    world.leave_to_first()
    saved = save(clustered, artifact, card_files(clustered))
    report = cluster_report(saved)
    if as_json:
        print_json(report)
    else:
        print_clusters(report)
    if plot is not None:
        write_plot(plot, cluster_figure(saved, report))


def print_clusters(report: dict[str, Any]) -> None:
    settings = report["settings"]
    rows = []
    for entry in report["layers"]:
        starts = entry["warm_start"]
        middle = entry["clusterability"][len(entry["clusterability"]) // 2]
        rows.append(
            [
                str(entry["layer"]),
                entry["largest"],
                entry["radius_mean"],
                entry["radius_p95"],
                entry["radius_max"],
                entry["silhouette"] if entry["silhouette"] is not None else "–",
                entry["query_norm_max"],
                f"{middle['delta_r']:.3g} at {middle['clusters']}",
                " / ".join(f"{starts[start]['iterations']:.1f}" for start in ("calibrated", "plusplus", "random")),
            ]
        )
    header = ["layer", "largest", "radius", "p95", "max", "silhouette", "query norm", "δ·r", "iterations*"]
    print_table(f"{settings.get('clusters')} {settings.get('metric')} clusters per KV head", header, rows)
    print_lines(
        "largest: tokens of the largest cluster; radius, p95, max: distances of keys to their centroid (cosine: of",
        "directions); silhouette: -1 to 1, of a sample; query norm: the longest query; δ·r: radius of so many greedy",
        "balls that cover the keys, times query norm and softmax scale (what SubGen's bound grows with)",
        "* k-means on unseen text until within 1 % of the best: from calibrated centroids / k-means++ / random keys",
    )
