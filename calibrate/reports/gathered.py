"""All that a report shows, as plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path

from ...artifacts import Artifact, KvcalError
from ..sample_size import small_sample
from .answers import Sample, samples
from .fitted import Cover, Rank, Spectrum, covers, ranks, spectra
from .measured import Evaluation, evaluation
from .planned import Plan, plan
from .provenance import Provenance, provenance


@dataclass(frozen=True)
class Gathered:
    provenance: Provenance
    ranks: tuple[Rank, ...]
    spectra: tuple[Spectrum, ...]
    covers: tuple[Cover, ...]
    """() without the stage `clusters`."""
    evaluations: tuple[Evaluation, ...]
    samples: tuple[tuple[Sample, ...], ...]
    """Of each evaluation."""
    plan: Plan | None
    warnings: tuple[str, ...]


def gather(artifact: Artifact, results: Iterable[str | PathLike[str]] = ()) -> Gathered:
    """
    Args:
        results: files that `calibrate evaluate --output` wrote.

    Raises:
        KvcalError: an artifact without bases, or a file that holds no results.
    """
    if "pca" not in artifact.stages:
        raise KvcalError(f"{artifact.name}: has no stage pca, which a report is about: make it with `calibrate pca`")
    paths = [Path(fspath(path)) for path in results]
    names = [path.name for path in paths]
    found = [
        evaluation(artifact, path, path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}")
        for path in paths
    ]
    made = provenance(artifact)
    planned = plan(artifact)
    warnings = [warning for each in found for warning in each.warnings]
    if made.tokens is not None and (problem := small_sample(artifact)):
        warnings.append(f"{problem}.")
    return Gathered(
        provenance=made,
        ranks=tuple(ranks(artifact)),
        spectra=tuple(spectra(artifact)),
        covers=tuple(covers(artifact)),
        evaluations=tuple(found),
        samples=tuple(tuple(samples(each)) for each in found),
        plan=planned,
        warnings=(*warnings, *(planned.warnings if planned else ())),
    )
