"""Models: found by alias, Hub id, folder or GGUF file, and loaded.

Aliases are here at once; all else, and torch with it, is imported when it is first asked for.
"""

from typing import TYPE_CHECKING

from ...artifacts.lazy import lazy_names
from .aliases import DEMO_FOLDER, MODEL_ALIASES

if TYPE_CHECKING:
    from .context import check_seq_len, default_seq_len, max_context
    from .loading import LoadedModel, load_model
    from .same_weights import compare_weights
    from .source import ModelSource, resolve_model, spec_of

__all__ = [
    "DEMO_FOLDER",
    "MODEL_ALIASES",
    "LoadedModel",
    "ModelSource",
    "check_seq_len",
    "compare_weights",
    "default_seq_len",
    "load_model",
    "max_context",
    "resolve_model",
    "spec_of",
]

if not TYPE_CHECKING:  # a type checker would take any name for one of ours
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "LoadedModel": "loading",
            "ModelSource": "source",
            "check_seq_len": "context",
            "compare_weights": "same_weights",
            "default_seq_len": "context",
            "load_model": "loading",
            "max_context": "context",
            "resolve_model": "source",
            "spec_of": "source",
        },
        __all__,
    )
