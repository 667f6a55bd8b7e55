"""The parts of the page about coefficients that layers have in common, simulated."""

from __future__ import annotations

from pathlib import Path

from ..shared.lookup import read
from ..shared.tables import number, scores_of, table, with_error
from .subjects import Subject


def shared_basis(folder: Path, subject: Subject) -> str:
    """A simulation: keys and values held as coefficients in one basis for the layers of a group, the first ones only or
    in fewer bits; attention reads every token. In each column bytes held over those of 16 bits, and the attention
    error. The first column is of each layer's own keys and values in fewer bits, without a basis; groups of 1 have
    one."""
    rows = read(folder / f"{subject.model}-shared-basis.json").get("rows", [])
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    by_code: dict[str, dict[int | None, str]] = {}
    for row in rows:
        error = with_error(row["error"], row["error_se"])
        by_code.setdefault(row["code"], {})[row["size"]] = f"{row['bytes']:.3f}: {error}"
    lines = [[code, *(cells.get(size, "") for size in sizes)] for code, cells in by_code.items()]
    header = ["", *("each its own" if size is None else f"groups of {size}" for size in sizes)]
    return table(header, lines) if lines else ""


def group_errors(folder: Path, subject: Subject) -> str:
    """A simulation: attention errors of keys and values as they come back from coefficients of 8, 4, 2 or 0 bits, which
    are shared out by one rule, in groups of so many layers: each kept relative to the ones before it, as `xcla` does,
    or all in one basis. memory, read: over those of 16 bits."""
    rows = read(folder / f"{subject.model}-group-errors.json").get("rows", [])
    lines = [
        [
            str(row["size"]),
            row["way"] if row["size"] > 1 else "each layer by itself",
            *(number(row[name], ".3f") for name in ("memory", "read")),
            with_error(row["error"], row["error_se"]),
        ]
        for row in rows
    ]
    return table(["layers", "way", "memory", "read", "error"], lines) if lines else ""


def shared_basis_text(folder: Path, subject: Subject) -> str:
    """The same simulation, decoded: keys and values of a dense prefill replaced by what comes back from their codes.
    held: bytes, over those of 16 bits; to read them, a layer of a group reads those of the whole group."""
    full, *rows = read(folder / f"{subject.model}-shared-basis-text.json").get("rows", [None])
    lines = [
        [
            "each its own" if row["size"] is None else f"groups of {row['size']}",
            row["code"],
            number(row["bytes"]),
            with_error(row["perplexity_ratio"], row["perplexity_ratio_se"], ".4f"),
            *scores_of(row),
        ]
        for row in rows
    ]
    return table(["", "code", "held", "perplexity / full", *(full["scores"] if full else ())], lines) if lines else ""
