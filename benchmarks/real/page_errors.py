"""The parts of the page about calibrations, and about the attention error of what methods choose."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..shared.lookup import read
from ..shared.tables import named, number, table, with_error
from . import reservoir as sampling
from .choices import CHOICES
from .subjects import Subject


def ranks(folder: Path, subject: Subject) -> str:
    """Rank@90 by layer: of keys before and after the rotary embedding, of queries and values, calibrated on prose and
    code. Below, means of other calibration texts."""
    by_text = read(folder / f"{subject.model}-ranks.json")
    if "both" not in by_text:
        return ""
    found = by_text["both"]
    columns = ("key_pre", "key_post", "query_pre", "query_post", "value")
    rows = [
        [
            f"{layer['layer']}{'' if layer.get('window') is None else ' (window)'}",
            *(" ".join(map(str, layer[name])) for name in columns),
        ]
        for layer in found["layers"]
    ]
    means = [
        ["mean" if text == "both" else f"mean, {text}", *(number(report["model"][name], ".1f") for name in columns)]
        for text, report in sorted(by_text.items(), key=lambda item: item[0] != "both")
    ]
    return table(["layer", *columns], [*rows, *means])


def tokens(folder: Path, subject: Subject) -> str:
    """Ranks and attention errors by tokens calibrated on."""
    found = read(folder / f"{subject.model}-tokens.json")
    rows = []
    for size in subject.sizes:
        model = found.get(f"ranks {size}")
        if model is None:
            continue
        errors = [_error(entry) for text in ("prose", "code") for entry in found.get(f"{text} {size}", ())]
        rows.append([f"{size}", number(model["key_pre"], ".2f"), number(model["key_post"], ".2f"), *errors])
    header = ["tokens", "rank@90 pre", "rank@90 post", "prose, PCA", "prose, score", "code, PCA", "code, score"]
    return table(header, rows) if rows else ""


def bases(folder: Path, subject: Subject) -> str:
    """The attention error by rank, of every basis."""
    found = read(folder / f"{subject.model}-bases.json")
    if not found:
        return ""
    first = next(iter(found.values()))
    rows = [
        [str(entry["setting"]["rank"]), *(_error(column[at]) for column in found.values())]
        for at, entry in enumerate(first)
    ]
    return table(["rank", *found], rows)


def transfer(folder: Path, subject: Subject) -> str:
    """The attention error by calibrated text and evaluated text."""
    found = read(folder / f"{subject.model}-transfer.json")
    if not found:
        return ""
    first = next(iter(found.values()))
    header = ["calibrated → evaluated", *(f"{entry['setting']['basis']} {entry['setting']['rank']}" for entry in first)]
    return table(header, [[key, *map(_error, row)] for key, row in found.items()])


def block_lengths(folder: Path, subject: Subject) -> str:
    """The attention error by tokens that are decoded after, and tokens of the blocks calibrated on. Loki at a sixteenth
    of the tokens in a quarter of the dimensions, by basis; spectral at an eighth of the bytes."""
    found = read(folder / f"{subject.model}-block-lengths.json")
    header = ["", "PCA", "score basis", "PCA before the rotary embedding", "spectral"]
    return table(header, [[key, *map(_error, row)] for key, row in found.items()]) if found else ""


def first_token(folder: Path, subject: Subject) -> str:
    """Attention output errors with what a method chooses, and with the first token (or page) besides. mass: of the
    dense attention, on the first token; read: share of heads and steps that choose it. Means of layers. Below, by
    layer: its logit above the mean of tokens from 64 on, exact and in a quarter of the dimensions (of PCA also
    calibrated in longer blocks); lengths of keys."""
    found = read(folder / f"{subject.model}-first-token.json")
    rows, logits = found.get("settings", []), found.get("logits", [])
    longer = {row["layer"]: row["in_pca"] for row in found.get("logits, long blocks", [])}
    lines = [
        [
            named(row["setting"]),
            *(with_error(row.get(name), row.get(f"{name}_se")) for name in ("mass", "read", "error", "error_with")),
        ]
        for row in rows
    ]
    columns = {
        **{"layer": "layer", "logit": "logit", "in_pca": "in PCA", "longer": "in PCA, longer blocks"},
        **{"in_score": "in the score basis", "length": "length", "length_of_others": "of others"},
    }
    by_layer = [
        [
            number((row | {"longer": longer.get(row["layer"])})[name], "g" if name == "layer" else ".1f")
            for name in columns
        ]
        for row in logits
    ]
    first = table(["method", "mass", "read", "error", "error, always read"], lines)
    second = table(list(columns.values()), by_layer)
    return f"{first}\n\n{second}" if rows else ""


def choices(folder: Path, subject: Subject) -> str:
    """The same bytes spent in different ways, by what is chosen."""
    found = read(folder / f"{subject.model}-choices.json")
    rows = [
        [name, *_errors_of(entry)]
        for name, settings in CHOICES.items()
        for setting in settings
        for entry in found.get(f"{name}: {json.dumps(setting)}", ())
    ]
    header = ["choice", "method", "read", "error", "without the first layer", "worst layer"]
    return table(header, rows) if rows else ""


def attention(folder: Path, subject: Subject) -> str:
    """Every method at equal bytes: the attention error, mean of layers, without the first, and the worst layer."""
    parts = []
    for length in subject.lengths:
        found = read(folder / f"{subject.model}-attention-{length}.json")
        measured = [(key.partition(" ")[0], entry) for key, entries in found.items() for entry in entries]
        ordered = sorted(measured, key=lambda row: row[1]["bytes"])
        rows = [[level, *_errors_of(entry)] for level, entry in ordered]
        if rows:
            header = ["bytes", "method", "read", "error", "without the first layer", "worst layer"]
            parts.append(f"### {length} tokens\n\n{table(header, rows)}")
    return "\n\n".join(parts)


def _errors_of(entry: Mapping[str, Any]) -> Sequence[str]:
    layers = list(entry["by_layer"].items())
    worst, error = max(layers, key=lambda item: item[1])
    others = statistics.mean(value for _, value in layers[1:]) if len(layers) > 1 else None
    return [
        named(entry["setting"]),
        number(entry["bytes"], ".4f"),
        _error(entry),
        number(others),
        f"{error:.2f} ({worst})",
    ]


def _error(entry: Mapping[str, Any]) -> str:
    return with_error(entry["error"], entry["error_se"])


def thresholds(folder: Path, subject: Subject) -> str:
    """`spectral`'s choice by a threshold from a strided sample, beside the exact one, at equal bytes. read: tokens,
    over those of the exact choice; most: the same of one head and step; mass: the share of the dense attention on what
    is read. The last 16 tokens of 4 texts are decoded: of a text that goes on, of prose that code follows, of a
    question."""
    found = read(folder / f"{subject.model}-thresholds.json")
    rows = [
        [key, _choice(row), *_with_errors(row, "read"), number(row["most"], ".2f"), *_with_errors(row, "mass", "error")]
        for key, choices in found.items()
        for row in choices
    ]
    return table(["tokens, bytes, text", "choice", "read", "most", "mass", "error"], rows) if rows else ""


def _choice(row: Mapping[str, Any]) -> str:
    return f"sample of {row['sample']}" if row["choice"] == "sampled" else "exact"


def _with_errors(row: Mapping[str, Any], *names: str) -> list[str]:
    return [with_error(row[name], row[f"{name}_se"]) for name in names]


def codewords(folder: Path, subject: Subject) -> str:
    """`spectral` at equal bytes by the size of its codebook, the tables of larger ones paid for with rows."""
    found = read(folder / f"{subject.model}-codewords.json")
    rows = [[key, *_errors_of(entry)] for key, entries in found.items() for entry in entries]
    return table(["bytes", "method", "read", "error", "without the first layer", "worst layer"], rows) if rows else ""


def reservoir(folder: Path, subject: Subject) -> str:
    """By sampled tokens, of unseen text: attention errors of `spectral`, and of keys and values as they come back from
    codes of `xcla`; the share of the variance of keys and values that the codebook does not explain; squared distances
    of the directions of keys to the nearest of 128 centroids. In brackets, by how much that is more than of the largest
    sample, paired over texts; means of up to three samples. Silhouettes, and what `share` says of reading the layer
    before, are of the sample itself."""
    found = read(folder / f"{subject.model}-reservoir.json")
    return table(["tokens", *sampling.COLUMNS], sampling.rows(found)) if found else ""


def alternatives(folder: Path, subject: Subject) -> str:
    """What `spectral` could do otherwise, at an eighth of the bytes, in a simulation of its step with the exact choice:
    tokens read, the attention error, and by how much it is larger than that of the simulation as it is, paired over
    texts. The first row is the step itself."""
    found = read(folder / f"{subject.model}-alternatives.json")
    rows = [
        [
            row["what"],
            number(row["tokens"], ".0f"),
            with_error(row["error"], row["error_se"], ".4f"),
            with_error(row["more"], row["more_se"], ".5f") if "more" in row else "",
        ]
        for measured in found.values()
        for row in measured
    ]
    return table(["", "tokens", "error", "more"], rows) if rows else ""
