"""What `spectral` could do otherwise: other codes, rows, budgets, ways to choose and stand-ins, at the same bytes.

In a simulation of its step, with the exact choice. The first row of the table is the step itself, and how far the
simulation is from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvcal.artifacts import Artifact
from kvcal.calibrate.evaluation.standard_errors import mean
from kvcal.calibrate.planning.points import Problem

from .attention import errors
from .settings import spectral_of
from .simulation import LEVEL, Layer, Variation, mass_share

VARIATIONS: dict[str, Variation] = {
    "as it is": Variation(),
    "not rotated": Variation(rotated=False),
    "4 bits in an eighth of the dimensions, 2 in the next quarter": Variation(codes=((1 / 8, 4), (1 / 4, 2))),
    "8 bits in a sixteenth of the dimensions, 2 in the next quarter": Variation(codes=((1 / 16, 8), (1 / 4, 2))),
    "rows of 16 bits": Variation(rows=16),
    "rows of 4 bits": Variation(rows=4),
    "rows turned by a matrix of 16-bit numbers": Variation(rounded=True),
    "tokens by mass": Variation(by_mass=True),
    "nothing for what is not read": Variation(base="nothing", pages=False),
    "codewords, no pages": Variation(pages=False),
    "pages, no codewords": Variation(base="page"),
    "codewords by their means in the sequence, no pages": Variation(base="sequence", pages=False),
    "codewords by their means in the sequence": Variation(base="sequence"),
    "between these means and the codebook's, no pages": Variation(base="between", pages=False),
    "between these means and the codebook's": Variation(base="between"),
    "chosen by the largest logit of a group": Variation(select="max"),
    "chosen by each query head for itself": Variation(select="head"),
    "estimates plus half of their square error": Variation(noise=1.0),
    "estimates less half of their square error": Variation(noise=-1.0),
}


def alternatives(found: Sequence[Problem], artifact: Artifact) -> list[dict[str, Any]]:
    """Of the step itself and of each variation "error" and "error_se" over texts, "tokens" that were read at a step,
    and "more" and "more_se": by how much it errs more than the simulation of the step as it is, paired over texts."""
    head_dim, length = found[0].key.shape[3], found[0].prefix
    (setting,) = spectral_of(head_dim // 2, 2, LEVEL, head_dim, length)
    (itself,) = errors(found, [{**setting, "choice": "exact"}], artifact)
    by_text = {"the step itself": itself["by_text"]}
    tokens = {}
    for name, variation in VARIATIONS.items():
        by_text[name], tokens[name] = _measured(found, artifact, variation)
    rows = []
    for name, values in by_text.items():
        error, error_se = mean(values)
        row = {"what": name, "error": error, "error_se": error_se, "tokens": tokens.get(name)}
        if name != "as it is":
            more = mean([one - other for one, other in zip(values, by_text["as it is"], strict=True)])
            row["more"], row["more_se"] = more
        rows.append(row)
    return rows


@torch.no_grad()
def _measured(found: Sequence[Problem], artifact: Artifact, variation: Variation) -> tuple[list[float], float]:
    """([B] errors, tokens read at a step), means of layers, heads and steps."""
    share = None
    if variation.by_mass:
        share = mass_share([Layer(problem, artifact, variation) for problem in found])
    measured = [Layer(problem, artifact, variation).measured(share) for problem in found]
    errors_of, read = zip(*measured, strict=True)
    return torch.stack(errors_of).mean(0).tolist(), sum(read) / len(read)
