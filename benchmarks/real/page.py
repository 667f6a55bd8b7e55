"""docs/results/real.md: tables of what was measured, below the words of page.md.j2."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..shared.page import Page
from . import figure, page_bases, page_decoding, page_errors, page_sharing, page_subgen, stated
from .subjects import SUBJECTS, Subject

Part = Callable[[Path, Subject], str]

PARTS: Mapping[str, tuple[str, Part]] = {
    "ranks": ("Ranks by layer", page_errors.ranks),
    "tokens": ("How much text is enough", page_errors.tokens),
    "bases": ("Key PCA and the score basis", page_errors.bases),
    "transfer": ("Calibration text against evaluation text", page_errors.transfer),
    "block-lengths": ("Decoding after more tokens than were calibrated on at once", page_errors.block_lengths),
    "first-token": ("The first token", page_errors.first_token),
    "attention": ("Attention errors at equal bytes", page_errors.attention),
    "thresholds": ("A choice by threshold", page_errors.thresholds),
    "codewords": ("How many codewords", page_errors.codewords),
    "reservoir": ("How many sampled tokens", page_errors.reservoir),
    "alternatives": ("What spectral does not do", page_errors.alternatives),
    "choices": ("What the defaults are chosen from", page_errors.choices),
    "methods": ("Decoding at equal bytes", page_decoding.methods),
    "short-blocks": ("The same, calibrated in shorter blocks", page_decoding.short_blocks),
    "papers": ("Decoding with the papers' settings", page_decoding.papers),
    "defaults": ("Decoding with our defaults", page_decoding.defaults),
    "why-loki": ("Why Loki loses", page_decoding.why_loki),
    "uncentred": ("Without subtracting the mean", page_decoding.uncentred),
    "by-answers": ("Chosen by answers", page_decoding.by_answers),
    "questions": ("Calibrated on questions", page_decoding.questions),
    "question-seen": ("The question in the prompt", page_decoding.question_seen),
    "ruler-full": ("RULER, the model itself", page_decoding.ruler_full),
    "ruler": ("RULER, methods", page_decoding.ruler),
    "aims": ("What spectral keeps of long contexts", page_decoding.aims),
    "plans": ("Plans", page_decoding.plans),
    "sharing": ("Layers that share keys and values, not trained", page_sharing.sharing),
    "uptraining": ("The same, trained", page_sharing.uptraining),
    "shared-basis": ("One basis for several layers", page_bases.shared_basis),
    "shared-basis-text": ("The same, decoded", page_bases.shared_basis_text),
    "group-errors": ("Layer by layer, or in one basis, with the bits of xcla", page_bases.group_errors),
    "xcla": ("Common coefficients, decoded", page_sharing.xcla),
    "clusterable": ("Are keys clusterable", page_subgen.clusterable),
    "estimates": ("SubGen's estimates", page_subgen.estimates),
    "subgen-decoded": ("SubGen, decoded", page_decoding.subgen),
    "lines": ("Line retrieval", page_subgen.lines),
}


def values(results: Path) -> dict[str, Any]:
    folder = results / "real"
    return {**stated.values(folder), "contents": contents(folder), "tables": tables(folder)}


def measured(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(title, model, section) of every part that was measured."""
    for name, (title, part) in PARTS.items():
        for subject in SUBJECTS.values():
            if body := part(folder, subject):
                about = " ".join((part.__doc__ or name).split())
                yield title, subject.model, f"## {title}: {subject.model}\n\n{about}\n\n{body}"


def tables(folder: Path) -> str:
    return "\n\n".join(section for _, _, section in measured(folder))


def contents(folder: Path) -> str:
    """A list of the tables, with links to them by model."""
    links: dict[str, list[str]] = {}
    for title, model, _ in measured(folder):
        links.setdefault(title, []).append(f"[{model}](#{anchor(f'{title}: {model}')})")
    return "\n".join(f"- {title}: {', '.join(models)}" for title, models in links.items())


def anchor(heading: str) -> str:
    """As GitHub names a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


PAGE = Page(
    "real.md",
    Path(__file__).with_name("page.md.j2"),
    values,
    lambda results: figure.figures(results / "real", next(iter(SUBJECTS.values()))),
)
