"""Figures from artifacts, as PNG bytes that are the same for the same numbers."""

from __future__ import annotations

import io
from typing import Any

import torch

from ..artifacts import Artifact
from ..artifacts.errors import one_line

_LABELS = {
    "key_pre": "keys, pre-rotary",
    "key_post": "keys, post-rotary",
    "query_pre": "queries, pre-rotary",
    "query_post": "queries, post-rotary",
    "value": "values",
}


def rank_figure(artifact: Artifact, report: dict[str, Any]) -> bytes:
    """Left: rank@p by layer, mean over KV heads with their range. Right: explained variance of post-rotary keys.

    Layers with a sliding window have a grey ground on the left and grey curves on the right.
    """
    figure, (by_layer, curves) = two_panels()
    percent = f"{100 * report['variance']:g}"
    layers, averaged = [entry["layer"] for entry in report["layers"]], report["averaged"]
    sliding = [entry["layer"] for entry in report["layers"] if entry["window"] is not None]
    for layer in sliding:
        label = "sliding window" if layer == sliding[0] else None
        by_layer.axvspan(layer - 0.5, layer + 0.5, facecolor="0.94", edgecolor="0.85", zorder=0, label=label)
    for column, (quantity, label) in enumerate(_LABELS.items()):
        ranks = [entry[quantity] for entry in report["layers"]]
        means = [sum(heads) / len(heads) for heads in ranks]
        by_layer.plot(layers, means, marker="o", markersize=4, color=f"C{column}", label=label)
        by_layer.fill_between(layers, [min(h) for h in ranks], [max(h) for h in ranks], color=f"C{column}", alpha=0.12)
    head_dim = max(layer.head_dim for layer in artifact.layers)
    by_layer.axhline(head_dim, color="0.6", linewidth=0.8, linestyle=":")
    by_layer.annotate(f"head dim {head_dim}", (layers[0], head_dim), va="bottom", fontsize=8, color="0.4")
    by_layer.set(xlabel="layer", ylabel=f"dimensions for {percent} % of the variance", ylim=(0, head_dim * 1.35))
    by_layer.xaxis.get_major_locator().set_params(integer=True)
    by_layer.set_title(f"Rank@{percent} (mean and range over KV heads)", fontsize=10)
    by_layer.legend(fontsize=8, frameon=False, ncols=3, loc="upper center")

    for layer in [layer for layer in layers if layer not in averaged]:
        explained = _explained(artifact, layer, "key_post")
        curves.plot(range(1, len(explained) + 1), explained, color="0.85", linewidth=0.8)
    shades = _shades(len(averaged))
    for layer, shade in zip(averaged, shades, strict=True):
        explained = _explained(artifact, layer, "key_post")
        curves.plot(range(1, len(explained) + 1), explained, color=shade, linewidth=1.2)
    pre = [_explained(artifact, layer, "key_pre") for layer in averaged]
    for dim in sorted({len(explained) for explained in pre}):
        alike = [explained for explained in pre if len(explained) == dim]
        curves.plot(range(1, dim + 1), sum(alike) / len(alike), color="black", linestyle="--", linewidth=1.2)
    curves.plot([], [], color="black", linestyle="--", label="pre-rotary, mean of layers")
    curves.plot([], [], color=shades[0], label=f"post-rotary, layer {averaged[0]}")
    if len(averaged) > 1:
        curves.plot([], [], color=shades[-1], label=f"post-rotary, layer {averaged[-1]}")
    if len(averaged) < len(layers):
        curves.plot([], [], color="0.85", label="post-rotary, sliding window")
    curves.axhline(report["variance"], color="0.6", linewidth=0.8, linestyle=":")
    curves.set(
        xlabel="dimensions kept", ylabel="fraction of variance explained", ylim=(0, 1.02), xlim=(0, head_dim + 1)
    )
    curves.set_title("Explained variance of keys (mean over KV heads)", fontsize=10)
    curves.legend(fontsize=8, frameon=False, loc="lower right")
    return png(figure, f"{artifact.model.id} on {data_name(artifact)}")


def cluster_figure(artifact: Artifact, report: dict[str, Any]) -> bytes:
    """Left: cover radius against the number of clusters. Right: iterations that calibrated centroids save."""
    figure, (cover, starts) = two_panels()
    shades = _shades(len(report["layers"]))
    for entry, shade in zip(report["layers"], shades, strict=True):
        curve = entry["clusterability"]
        start = curve[0]["delta"] or 1.0
        cover.plot(
            [point["clusters"] for point in curve],
            [point["delta"] / start for point in curve],
            color=shade,
            marker=".",
            label=f"layer {entry['layer']}" if entry in (report["layers"][0], report["layers"][-1]) else None,
        )
    cover.set_xscale("log", base=2)
    cover.set(xlabel="clusters (greedy k-center)", ylabel="largest radius, relative to one cluster", ylim=(0, 1.05))
    cover.set_title("Clusterability of post-rotary keys (worst head)", fontsize=10)
    cover.legend(fontsize=8, frameon=False)
    names = {"calibrated": "calibrated centroids", "plusplus": "k-means++", "random": "random keys"}
    layers = [entry["layer"] for entry in report["layers"]]
    for column, (start, label) in enumerate(names.items()):
        iterations = [entry["warm_start"][start]["iterations"] for entry in report["layers"]]
        starts.plot(layers, iterations, marker="o", markersize=4, color=f"C{column}", label=label)
    starts.set(xlabel="layer", ylabel="k-means iterations until within 1 % of the best", ylim=(0, None))
    starts.xaxis.get_major_locator().set_params(integer=True)
    starts.set_title("Starting point of clustering on unseen text", fontsize=10)
    starts.legend(fontsize=8, frameon=False)
    return png(figure, f"{artifact.model.id} on {data_name(artifact)}")


def codebook_figure(artifact: Artifact, report: dict[str, Any]) -> bytes:
    """What codewords leave of the variance of keys (left) and values (right), by size and layer, seen and unseen."""
    figure, panels = two_panels()
    shades = _shades(len(report["layers"]))
    for panel, quantity in zip(panels, ("key", "value"), strict=True):
        for entry, shade in zip(report["layers"], shades, strict=True):
            sizes = [carried["codewords"] for carried in entry["carry"]]
            ends = entry in (report["layers"][0], report["layers"][-1])
            for text, style in (("unseen", "-"), ("fitted", ":")):
                label = f"layer {entry['layer']}, {text} text" if ends else None
                unexplained = [carried[f"{quantity}_{text}"] for carried in entry["carry"]]
                panel.plot(sizes, unexplained, style, color=shade, marker=".", label=label)
        panel.set_xscale("log", base=2)
        panel.set(xlabel="codewords", ylabel="share of the variance that is left", ylim=(0, 1.05))
        panel.set_title(f"Codebooks of keys and values: {quantity}s", fontsize=10)
        panel.legend(fontsize=8, frameon=False)
    return png(figure, f"{artifact.model.id} on {data_name(artifact)}")


def _explained(artifact: Artifact, layer: int, quantity: str) -> torch.Tensor:
    values = artifact.tensor("pca", layer, f"{quantity}.eigenvalues")
    return (values.cumsum(-1) / values.sum(-1, keepdim=True)).mean(0)


def data_name(artifact: Artifact) -> str:
    return str(artifact.data.get("source", {}).get("id", "text"))


def two_panels() -> tuple[Any, Any]:
    figure, (axes,) = rows_of_two_panels(1)
    return figure, axes


def rows_of_two_panels(count: int) -> tuple[Any, Any]:
    """(figure, axes [count, 2])."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Figure without pyplot: no global state, no display, safe in threads and tests.
    figure = Figure(figsize=(11, 4.2 * count), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(count, 2, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _shades(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](0.9 * index / max(1, count - 1)) for index in range(count)]


def short_name(text: object, most: int = 100) -> str:
    """A name of a stranger's in a figure: one line, and not so long that it takes the figure's place."""
    shown = one_line(text)
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def png(figure: Any, title: str) -> bytes:
    from matplotlib.legend import Legend

    # Names are no formulas: a dollar sign in one would be read as the beginning of mathematics.
    figure.suptitle(short_name(title, 160), fontsize=11, parse_math=False)
    for legend in figure.findobj(Legend):
        for text in legend.get_texts():
            text.set_parse_math(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
