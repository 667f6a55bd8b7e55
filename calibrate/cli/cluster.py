from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .job import one_job
from .numbers import plain
from .options import artifact_argument
from .output import json_option, plot_option, print_lines, print_result, print_table, progress_bar, write_plot
from .types import TokenCount

if TYPE_CHECKING:
    from ...artifacts import Artifact
    from ..distributed import World


@click.command("cluster")
@artifact_argument()
@click.option(
    "--clusters",
    type=click.IntRange(1),
    help="Make this many clusters per KV head, whatever --tokens-per-cluster says.",
)
@click.option(
    "--tokens-per-cluster",
    type=TokenCount(),
    show_default="32; joint: 64 clusters",
    help="Make one cluster for this many sampled tokens.",
)
@click.option(
    "--metric",
    type=click.Choice(["cosine", "l2", "joint"]),
    default="cosine",
    help="Cluster keys by cosine or l2, or keys and values together (joint) into the codebooks that spectral decodes "
    "with.",
)
@click.option("--iterations", type=click.IntRange(1), default=20, help="Run k-means for at most this many iterations.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Draw the first centroids by this seed.")
@plot_option
@json_option
@one_job
def cluster_command(artifact: Path, metric: str, plot: Path | None, as_json: bool, world: World, **sizes: Any) -> None:
    """Cluster the sampled keys per layer and KV head.

    faiss makes the clusters by k-means, and ARTIFACT gets the stage `clusters`.

    With --metric joint keys and values are clustered together, and the stage is `codebook`, which `calibrate pca` has
    made with its defaults already.

    \b
    Example:
      calibrate cluster mistral-7b-wikitext --tokens-per-cluster 32 --plot clusters.png
      calibrate cluster mistral-7b-wikitext --metric joint --clusters 128
    """
    from ...artifacts import load, save
    from ...artifacts.places import check_can_write_in
    from ..card import card_files

    found = load(artifact)
    check_can_write_in(artifact)
    world.agree_on({"content of ARTIFACT": str(found.content_hash)})
    with progress_bar("clustering") as progress:
        clustered = _clustered(found, metric, sizes, {"progress": progress, "world": world})
    world.leave_to_first()
    saved = save(clustered, artifact, card_files(clustered))
    report, show, figure = _reported(saved, metric)
    print_result(as_json, report, lambda: show(report), artifact)
    if plot is not None:
        write_plot(plot, figure(saved, report))


def _clustered(found: Artifact, metric: str, sizes: dict[str, Any], running: dict[str, Any]) -> Artifact:
    from ..cluster_stage import cluster
    from ..codebook_stage import codebook

    clusters, per_cluster = sizes.pop("clusters"), sizes.pop("tokens_per_cluster")
    if metric != "joint":
        return cluster(
            found, clusters=clusters, tokens_per_cluster=per_cluster or 32, metric=metric, **sizes, **running
        )
    return codebook(found, codewords=clusters, tokens_per_codeword=per_cluster, **sizes, **running)


def _reported(saved: Artifact, metric: str) -> tuple[dict[str, Any], Callable[[dict[str, Any]], None], Any]:
    """(report, what prints it, what draws it)"""
    from ..cluster_stage import cluster_report
    from ..codebook_stage import codebook_report
    from ..plots import cluster_figure, codebook_figure

    if metric == "joint":
        return codebook_report(saved), print_codebook, codebook_figure
    return cluster_report(saved), print_clusters, cluster_figure


def print_codebook(report: dict[str, Any]) -> None:
    sizes = [entry["codewords"] for entry in report["layers"][0]["carry"]]
    rows = []
    for layer in report["layers"]:
        carried = [
            f"{entry[f'{name}_fitted']:.2f} → {entry[f'{name}_unseen']:.2f}"
            for name in ("key", "value")
            for entry in layer["carry"]
        ]
        rows.append([str(layer["layer"]), layer["largest"], layer["smallest"], *carried])
    header = ["layer", "largest", "smallest", *(f"{name}, {size}" for name in ("keys", "values") for size in sizes)]
    print_table(f"{report['settings'].get('codewords')} codewords per KV head", header, rows)
    print_lines(
        "largest, smallest: sampled tokens of a codeword; keys, 16: the share of the keys' variance that 16 codewords",
        "do not explain, fitted to the first half of the sample: of that half → of the other (mean over KV heads)",
    )


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
                f"{plain(middle['delta_r'])} at {middle['clusters']}",
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
