"""Models: found by alias, Hub id, folder or GGUF file, and loaded."""

from .aliases import DEMO_FOLDER, MODEL_ALIASES
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
    "default_seq_len",
    "compare_weights",
    "load_model",
    "max_context",
    "resolve_model",
    "spec_of",
]
