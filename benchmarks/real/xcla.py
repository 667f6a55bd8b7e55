"""Common coefficients of few bits for groups of layers, and for each layer by itself, decoded."""

from __future__ import annotations

from decoding import decode, text_and_passkey, whole
from subjects import Bench

CODES = ((3, 0.17), (1, 0.17), (3, 0.25), (1, 0.25), (3, 0.125), (1, 0.125))
"""Layers of a group, and memory over that of 16-bit keys and values."""


def xcla(bench: Bench, only: str | None = None) -> None:
    """Perplexity and passkey by memory."""
    for group, memory in CODES:
        name = f"xcla-{group}-{memory}"
        fit = ["xcla", "--model", bench.subject.spec, "--group", str(group), "--memory", str(memory)]
        decode(
            bench, name, text_and_passkey(bench), [{"method": "xcla"}], bench.changed(name, [fit]), full_of=whole(bench)
        )
