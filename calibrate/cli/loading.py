"""Models as commands load them: with a progress bar, and a line about where they came from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .output import progress_bar, say, working
from .verbosity import detail

if TYPE_CHECKING:
    from ...artifacts import Artifact


def load_model_of(spec: str, **options: Any) -> Any:
    """`load_model` with a bar for what takes long, the conversion of a GGUF file. Raises KvcalError as it does."""
    from ..models import load_model

    with progress_bar("loading the model") as progress:
        loaded = load_model(spec, progress=progress, **options)
    source = loaded.source
    place = source.folder or (source.gguf[0] if source.gguf else "the Hub")
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    detail(f"model {source.id}: from {place}, revision {source.revision}, {dtype} on {loaded.model.device}")
    if source.gguf and source.revision and source.revision not in spec:
        say(f"{spec}: from the package {source.revision}, whose weights are quantised: they are not the Hub's")
    return loaded


def load_calibrated(artifact: Artifact, spec: str | None, **options: Any) -> Any:
    """The model that an artifact was calibrated on, its weights checked (in another dtype as far as possible).

    Args:
        spec: None: the model that the artifact names.

    Raises:
        KvcalError: not found, not loadable, or another model.
    """
    from ..models import compare_weights, spec_of

    loaded = load_model_of(spec or spec_of(artifact.model), **options)
    with working("comparing weights"):
        note = compare_weights(artifact, loaded.model, loaded.exact)
    if note:
        say(note)
    return loaded
