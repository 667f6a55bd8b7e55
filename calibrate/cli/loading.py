"""Models as commands load them: with progress, and said where they came from."""

from __future__ import annotations

from typing import Any

from .output import progress_bar, say


def load_model_of(spec: str, **options: Any) -> Any:
    """`load_model` with a bar for what takes long, the conversion of a GGUF file. Raises KvcalError as it does."""
    from ..models import load_model

    with progress_bar("loading the model") as progress:
        loaded = load_model(spec, progress=progress, **options)
    source = loaded.source
    if source.gguf and source.revision and source.revision not in spec:
        say(f"{spec}: from the package {source.revision}, whose weights are quantised: they are not the Hub's")
    return loaded
