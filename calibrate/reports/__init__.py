"""What an artifact holds and how well its methods do, as one HTML page that needs no network."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike

from ...artifacts import Artifact
from ...artifacts.packages import require


def report(artifact: Artifact, results: Iterable[str | PathLike[str]] = ()) -> str:
    """The page of `calibrate report`: ranks, spectra, quality against bytes, plan, answers and provenance.

    Args:
        results: files that `calibrate evaluate --output` wrote, of this artifact, others or other models; the page says
            which. Answers are read from the predictions beside them.

    Returns:
        HTML, about 1 MB, of which 0.9 are the library that draws.

    Raises:
        KvcalError: an artifact without the stage `pca`, or a file that holds no results.
    """
    require("jinja2", "altair", "vl_convert", "matplotlib", to="draw a report")
    from .gathered import gather
    from .page import render

    return render(gather(artifact, results))
