"""Figures from artifacts, as PNG bytes that are the same for the same numbers."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import torch

from ..artifacts import Artifact
from ..artifacts.errors import one_line
from .palette import COMPARED_COLORS, LAYER_COLORS, QUANTITY_COLORS

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
    for quantity, label in _LABELS.items():
        ranks, color = [entry[quantity] for entry in report["layers"]], QUANTITY_COLORS[quantity]
        means = [sum(heads) / len(heads) for heads in ranks]
        by_layer.plot(layers, means, marker="o", markersize=4, color=color, label=label)
        by_layer.fill_between(layers, [min(h) for h in ranks], [max(h) for h in ranks], color=color, alpha=0.12)
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
    for layer, shade in zip(averaged, layer_shades(averaged), strict=True):
        explained = _explained(artifact, layer, "key_post")
        curves.plot(range(1, len(explained) + 1), explained, color=shade, linewidth=1.2)
    pre = [_explained(artifact, layer, "key_pre") for layer in averaged]
    for dim in sorted({len(explained) for explained in pre}):
        alike = [explained for explained in pre if len(explained) == dim]
        curves.plot(range(1, dim + 1), sum(alike) / len(alike), color="black", linestyle="--", linewidth=1.2)
    curves.plot([], [], color="black", linestyle="--", label="pre-rotary, mean of layers")
    if len(averaged) < len(layers):
        curves.plot([], [], color="0.85", label="post-rotary, sliding window")
    curves.axhline(report["variance"], color="0.6", linewidth=0.8, linestyle=":")
    curves.set(
        xlabel="dimensions kept", ylabel="fraction of variance explained", ylim=(0, 1.02), xlim=(0, head_dim + 1)
    )
    curves.set_title("Explained variance of keys, post-rotary (mean over KV heads)", fontsize=10)
    curves.legend(fontsize=8, frameon=False, loc="lower right")
    layer_bar(figure, curves, averaged)
    return png(figure, title_of(artifact))


def cluster_figure(artifact: Artifact, report: dict[str, Any]) -> bytes:
    """Left: cover radius against the number of clusters. Right: iterations that calibrated centroids save."""
    figure, (cover, starts) = two_panels()
    layers = [entry["layer"] for entry in report["layers"]]
    for entry, shade in zip(report["layers"], layer_shades(layers), strict=True):
        curve = entry["clusterability"]
        start = curve[0]["delta"] or 1.0
        cover.plot(
            [point["clusters"] for point in curve],
            [point["delta"] / start for point in curve],
            color=shade,
            marker=".",
        )
    cover.set_xscale("log", base=2)
    cover.set(xlabel="clusters (greedy k-center)", ylabel="largest radius, relative to one cluster", ylim=(0, 1.05))
    cover.set_title("Clusterability of post-rotary keys (worst head)", fontsize=10)
    layer_bar(figure, cover, layers)
    names = {"calibrated": "calibrated centroids", "plusplus": "k-means++", "random": "random keys"}
    for color, (start, label) in zip(COMPARED_COLORS, names.items(), strict=True):
        iterations = [entry["warm_start"][start]["iterations"] for entry in report["layers"]]
        starts.plot(layers, iterations, marker="o", markersize=4, color=color, label=label)
    starts.set(xlabel="layer", ylabel="k-means iterations until within 1 % of the best", ylim=(0, None))
    starts.xaxis.get_major_locator().set_params(integer=True)
    starts.set_title("Starting point of clustering on unseen text", fontsize=10)
    starts.legend(fontsize=8, frameon=False)
    return png(figure, title_of(artifact))


def codebook_figure(artifact: Artifact, report: dict[str, Any]) -> bytes:
    """What codewords leave of the variance of keys (left) and values (right), by size and layer, seen and unseen."""
    figure, panels = two_panels()
    layers = [entry["layer"] for entry in report["layers"]]
    for panel, quantity in zip(panels, ("key", "value"), strict=True):
        for entry, shade in zip(report["layers"], layer_shades(layers), strict=True):
            sizes = [carried["codewords"] for carried in entry["carry"]]
            for text, style in (("unseen", "-"), ("fitted", ":")):
                unexplained = [carried[f"{quantity}_{text}"] for carried in entry["carry"]]
                panel.plot(sizes, unexplained, style, color=shade, marker=".")
        for text, style in (("unseen", "-"), ("fitted", ":")):
            panel.plot([], [], style, color="0.3", label=f"{text} text")
        panel.set_xscale("log", base=2)
        panel.set(xlabel="codewords", ylabel="share of the variance that is left", ylim=(0, 1.05))
        panel.set_title(f"Codebooks of keys and values: {quantity}s", fontsize=10)
        panel.legend(fontsize=8, frameon=False)
    layer_bar(figure, panels, layers)
    return png(figure, title_of(artifact))


def _explained(artifact: Artifact, layer: int, quantity: str) -> torch.Tensor:
    values = artifact.tensor("pca", layer, f"{quantity}.eigenvalues")
    return (values.cumsum(-1) / values.sum(-1, keepdim=True)).mean(0)


def title_of(artifact: Artifact) -> str:
    """ "MODEL on TEXT", for the titles of figures."""
    return f"{plain_name(artifact.model.id)} on {plain_name(artifact.data.get('source', {}).get('id', 'text'))}"


def plain_name(found: object) -> str:
    """The name of a model or a text without what leads to it: "org/model" and "/models/model" are "model"; of several
    texts, joined by " + ", each one's."""
    parts = (re.split(r"[/\\]", part.rstrip("/\\"))[-1] for part in str(found).split(" + "))
    return " + ".join(part or "text" for part in parts)


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


def layer_shades(layers: Sequence[int]) -> list[Any]:
    """A colour for each layer, of the map that `layer_bar` explains."""
    from matplotlib.colors import LinearSegmentedColormap

    shades, most = LinearSegmentedColormap.from_list("layers", LAYER_COLORS), max(1, len(layers) - 1)
    return [shades(index / most) for index in range(len(layers))]


def layer_bar(figure: Any, axes: Any, layers: Sequence[int]) -> None:
    """The colours of `layer_shades` beside the panels, in place of a legend; nothing where there is one layer."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    if len(layers) < 2:
        return
    mappable = ScalarMappable(Normalize(-0.5, len(layers) - 0.5), ListedColormap(layer_shades(layers)))
    step = -(-len(layers) // 8)
    ticks = [*range(0, len(layers) - step, step), len(layers) - 1]
    bar = figure.colorbar(mappable, ax=axes, ticks=ticks)
    bar.set_ticklabels([str(layers[tick]) for tick in ticks])
    bar.set_label("layer", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


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
