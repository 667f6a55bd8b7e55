"""Names of the dtypes that a model is loaded in."""

from __future__ import annotations

from ..artifacts import KvcalError

DTYPES = ("auto", "float32", "bfloat16", "float16")
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
"""Other names -> those in `DTYPES`."""


def dtype_name(name: str) -> str:
    """One of `DTYPES`. Raises KvcalError for an unknown name."""
    found = SHORT.get(name.lower(), name.lower())
    if found not in DTYPES:
        raise KvcalError(f"unknown dtype {name!r}: give {', '.join(DTYPES)} (or {', '.join(SHORT)})")
    return found
