from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...artifacts.places import check_new_file
from ..defaults import NUM_TOKENS, RESERVOIR
from .analyze_rank import print_ranks
from .cluster import print_clusters
from .evaluation_table import print_results
from .numbers import megabytes
from .options import force_option
from .output import is_png, json_option, print_lines, print_result, progress_bar, working, write_plot
from .pass_options import PassOptions, run_pass
from .summary import artifact_summary, print_summary

if TYPE_CHECKING:
    from ...artifacts import Artifact

LOKI = {"method": "loki", "rank": 0.25, "keep": 0.25}
SPECTRAL = {"method": "spectral", "rank": 32, "bits": 2, "keep": 0.03125}
PROMPTS: dict[str, Any] = {"prefix": 1024, "continuation": 64, "windows": 8, "episodes": 10}
BATCH_SIZE = 8


@click.command("demo")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("kvcal-demo"),
    help="Write the artifact to this folder.",
)
@force_option("Replace an artifact of another run that is at --output; nothing but an artifact is ever replaced.")
@json_option
def demo_command(output: Path, force: bool, as_json: bool) -> None:
    """Run all of it on the built-in model and text.

    Without a network it calibrates, clusters, verifies, and decodes with Loki and spectral.

    \b
    Example:
      calibrate demo --output /tmp/demo
    """
    from ...artifacts import load, save
    from ..card import card_files
    from ..checkpoint import Checkpoint
    from ..cluster_stage import cluster, cluster_report
    from ..evaluation.figure import evaluation_figure
    from ..plots import cluster_figure
    from ..rank import rank_report

    options = PassOptions(
        model_spec="demo",
        data_spec=("stdlib",),
        output=output,
        num_tokens=NUM_TOKENS,
        seq_len=2048,
        batch_size=None,
        split=None,
        seed=0,
        reservoir=RESERVOIR,
        device="cpu",
        dtype="auto",
        uncentred=False,
        resume=Checkpoint.beside(output, "").exists(),
        force=force,
    )
    if output.is_dir():
        check_new_file(output / "quality.png", is_png, "a PNG file")
    artifact = run_pass(options)
    if "clusters" not in artifact.stages:
        with progress_bar("clustering") as progress:
            clustered = cluster(artifact, progress=progress)
        figures = {"clusters.png": cluster_figure(clustered, cluster_report(clustered))}
        artifact = save(clustered, output, {**card_files(clustered), **figures})
    verified = load(output)
    ranks, clusters = rank_report(verified), cluster_report(verified)
    rows, texts = decode(verified)
    described = {"model": "demo", **PROMPTS, "question": "decoded", "batch_size": BATCH_SIZE}
    write_plot(output / "quality.png", evaluation_figure(described, rows))
    summary = artifact_summary(verified)
    report = {"artifact": summary, "ranks": ranks, "clusters": clusters, "results": rows, "side_by_side": texts}

    def show() -> None:
        print_summary(summary)
        print_lines("")
        print_ranks(ranks)
        print_lines("")
        print_clusters(clusters)
        print_lines("")
        print_results(described, rows)
        print_side_by_side(texts)
        print_lines("", f"verified: every hash, shape and dtype of {output} holds")
        print_lines(f"figures:  {output / 'rank.png'}  {output / 'clusters.png'}  {output / 'quality.png'}")
        print_lines(
            f"next:     calibrate evaluate {output} --data stdlib --split heldout --method spectral,loki,h2o,streaming"
        )

    print_result(as_json, report, show, output)


def decode(artifact: Artifact) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Loki and spectral beside the whole cache on text that neither training nor calibration saw: (rows, texts)."""
    from ..data import open_data
    from ..evaluation.grid import FULL
    from ..evaluation.prompts import make_prompts
    from ..evaluation.protocol import evaluate
    from ..evaluation.side_by_side import side_by_side
    from ..models import load_model

    loaded = load_model("demo", device="cpu")
    with working("reading unseen text"):
        prompts = make_prompts(
            open_data("stdlib", "heldout"), loaded.tokenizer, tasks=("perplexity", "passkey"), **PROMPTS
        )
    grid = [FULL, LOKI, SPECTRAL]
    with progress_bar("decoding", estimate=False) as progress:
        rows = evaluate(
            loaded.model, artifact, prompts, grid, tokenizer=loaded.tokenizer, batch_size=BATCH_SIZE, progress=progress
        )
    with working("generating"):
        return rows, side_by_side(loaded.model, loaded.tokenizer, artifact, prompts, grid)


def print_side_by_side(texts: list[dict[str, Any]]) -> None:
    for entry in texts:
        print_lines("", f"…{entry['prompt']!r}")
        for each in entry["continuations"]:
            read = megabytes(each["bytes_per_step"])
            print_lines(f"  {each['setting']['method']:8} reads {read} a step  →  {each['text']!r}")
