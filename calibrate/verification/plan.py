"""plan.json, as decoding would use it."""

from __future__ import annotations

from ...artifacts import Artifact
from ...runtime.planned import has_plan, methods_of, naming
from ...runtime.settings import builders, methods_by_layer


def check_plan(artifact: Artifact) -> None:
    """Methods, parameters and what they need of the artifact, for every layer with full attention.

    Raises:
        KvcalError: names the file and the layer.
    """
    if not has_plan(artifact):
        return
    layers = [layer.index for layer in artifact.layers if layer.window is None]
    methods = methods_of(artifact, len(artifact.layers))
    with naming(artifact):
        chosen = methods_by_layer(methods, {}, layers, len(artifact.layers))
        builders(chosen, [layer.head_dim for layer in artifact.layers], artifact)
