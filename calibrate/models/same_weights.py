"""Whether a loaded model has the weights that an artifact was calibrated on, also where they are of another dtype.

The hash is over the numbers as float32, which holds every bfloat16 and float16 number: a checkpoint in 16 bits is one
model in both. Rounded numbers have another hash, which says nothing else about them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...artifacts import Artifact, weights_sha256
from ...runtime import check_model

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HOLD = {
    "F32": (torch.float32,),
    "BF16": (torch.bfloat16, torch.float32),
    "F16": (torch.float16, torch.float32),
}
"""Dtype in a safetensors file -> dtypes that hold all its numbers."""


def compare_weights(artifact: Artifact, model: Any, exact: bool = False) -> str | None:
    """None: the weights are those of the artifact; otherwise a line about what was, or could not be, compared.

    Args:
        exact: the model has its checkpoint's numbers, none of them rounded.

    Raises:
        MismatchError: another architecture, or other weights.
    """
    check_model(artifact, model)
    calibrated, here = str(artifact.settings.get("dtype")), str(model.dtype).removeprefix("torch.")
    if weights_sha256(model) == artifact.model.weights_sha256:
        return None
    dtype = _DTYPES.get(calibrated)
    if dtype is None or dtype == model.dtype:
        check_model(artifact, model, weights=True)
    elif exact and _castable(model):
        rounded = weights_sha256(model, lambda _, weight: weight.to(dtype) if weight.is_floating_point() else weight)
        if rounded != artifact.model.weights_sha256:
            check_model(artifact, model, weights=True)
        return f"weights are {here}, the artifact's are these rounded to {calibrated}: another model of one checkpoint"
    return (
        f"weights are {here}, the artifact's were {calibrated}, and one of the two may be rounded: only the "
        "architecture was compared"
    )


def is_exact(folder: Path, dtype: torch.dtype) -> bool:
    """Whether the safetensors files of a checkpoint have nothing but numbers that `dtype` holds. False,
    too, where there are no safetensors files."""
    from safetensors import safe_open

    stored = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            stored |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    return bool(stored) and all(dtype in _HOLD.get(name, ()) for name in stored)


def _castable(model: Any) -> bool:
    """Whether transformers casts all of its numbers alike, so that rounding them here gives what it would load."""
    kept = (getattr(model, name, None) for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"))
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state: dict[str, Tensor] = model.state_dict()
    buffers = any(name not in parameters and value.is_floating_point() for name, value in state.items())
    return not (any(kept) or buffers or getattr(model.config, "quantization_config", None))
