"""Common coefficients of few bits for groups of layers, and for each layer by itself, decoded."""

from __future__ import annotations

from typing import Any

from .decoding import decode, text_and_passkey, whole
from .subjects import Bench

CODES = ((3, 0.17), (1, 0.17), (3, 0.125), (1, 0.125))
"""Layers of a group, and memory over that of 16-bit keys and values."""
ALL: dict[str, Any] = {"method": "xcla"}
CHOSEN: dict[str, Any] = {"method": "spectral", "rows": "xcla", "keep": 1 / 8, "rank": 0.5, "bits": 2}
"""With the first of CODES: a step reads a part of the tokens."""


def xcla(bench: Bench, only: str | None = None) -> None:
    """Perplexity and passkey by memory."""
    for group, memory in CODES:
        coded(bench, group, memory)


def coded(bench: Bench, group: int, memory: float) -> None:
    name = f"xcla-{group}-{memory}"
    fit = ["xcla", "--model", bench.subject.spec, "--group", str(group), "--memory", str(memory)]
    grid = [ALL, CHOSEN] if (group, memory) == CODES[0] else [ALL]
    decode(bench, name, text_and_passkey(bench), grid, bench.changed(name, [fit]), full_of=whole(bench))
