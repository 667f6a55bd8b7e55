"""`calibrate verify`: every promise of docs/format.md that `load` leaves to it, each a check with one line of error."""

from __future__ import annotations

from ...artifacts import Artifact
from ..cla.verify import check_sharing
from .bases import check_pca, check_score
from .clusterings import check_clusters
from .codebooks import check_codebook
from .group_codes import check_group_codes
from .manifest import check_manifest
from .moments import check_moments
from .plan import check_plan
from .sample import check_sample

DERIVED_FROM = {
    "pca": ("moments",),
    "score": ("moments",),
    "clusters": ("reservoir",),
    "codebook": ("moments", "reservoir"),
    "xcla": ("moments", "reservoir"),
}
"""Stage -> the stages that `verify` compares it with."""


def verify(artifact: Artifact) -> dict[str, tuple[str, ...]]:
    """Check the values of a loaded artifact against one another: derived ones are derived anew.

    All of it is read. Eigenvalues take most of the time: half a second per layer of 8 KV heads of dimension 128.

    Returns:
        What could not be checked: by stage, the stages that it is derived from and that are not there, as in a slim
        artifact. {} where everything was.

    Raises:
        ArtifactError: the first that does not hold: tensor, layer, KV head, value and expectation.
    """
    check_manifest(artifact)
    checks = {
        "moments": check_moments,
        "pca": check_pca,
        "score": check_score,
        "reservoir": check_sample,
        "clusters": check_clusters,
        "codebook": check_codebook,
        "cla": check_sharing,
        "xcla": check_group_codes,
    }
    for stage, check in checks.items():
        if stage in artifact.stages:
            check(artifact, f"{artifact.name}, stage {stage}")
    check_plan(artifact)
    absent = {
        stage: tuple(name for name in sources if name not in artifact.stages)
        for stage, sources in DERIVED_FROM.items()
        if stage in artifact.stages
    }
    return {stage: names for stage, names in absent.items() if names}


__all__ = ["verify"]
