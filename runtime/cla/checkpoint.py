"""Load a model whose layers share keys and values for good: `calibrate export ARTIFACT --model MODEL --cla FOLDER`."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.initialization import no_init_weights

from ...artifacts import KvcalError
from ..integration.checkpoint_folder import check_folder, check_size
from ..integration.checkpoint_json import check_heads, harmless
from .file import NAME, WEIGHTS, ClaFile
from .sharing import share

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_cla(folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> Any:
    """A transformers model in eval mode, on the CPU, whose layers share keys and values for good.

    It works as any other: `generate()`, `compress(model, artifact, method="loki")` with an artifact that was calibrated
    from this folder, `save`d caches, training. Nothing in the folder is executed.

    A plain `generate()` has transformers' own cache, in which every layer stores keys and values, those of a group
    several times. Inside `compress(model, method="full")`, or another method, they are stored once per group.

    The original model's artifact does not fit, since its bases are of other keys; as the configs are the same, only
    `check_model(artifact, model, weights=True)` tells the two models apart. Save a model that was trained further with
    `save_cla`: from what `save_pretrained()` wrote, transformers loads random numbers in the place of what is shared.

    Args:
        folder: of `calibrate export ARTIFACT --model MODEL --cla FOLDER`.
        dtype: None: as exported.

    Raises:
        KvcalError: no such folder, damaged, or of an architecture that this transformers does not know.
    """
    folder = Path(folder)
    header = ClaFile.read(folder)
    if dtype is None and header.dtype not in _DTYPES:
        raise KvcalError(f"{folder / NAME}: dtype {header.dtype!r}: one of {', '.join(_DTYPES)} is expected")
    model = _unfilled(folder, dtype or _DTYPES[header.dtype])
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            names = set(file.keys())
            reshaped = {}
            for name, place in model.state_dict(keep_vars=True).items():
                if name in names:
                    tensor = file.get_tensor(name)
                    if tensor.shape == place.shape:
                        place.detach().copy_(tensor)
                    else:  # a reading layer has only the queries' part of a joint projection
                        reshaped[name] = tensor
    except (SafetensorError, OSError) as error:
        raise KvcalError(f"{folder / WEIGHTS}: cannot be read ({error}): export the model again") from error
    sharing = share(model, header.sharing_map, pool="first", weights=reshaped)
    _check_complete(folder, model, names)
    sharing.keep()
    return model.eval().requires_grad_(False)


def _unfilled(folder: Path, dtype: torch.dtype) -> Any:
    """The model of the folder's config with zeros for weights."""
    check_folder(folder)
    try:
        config = harmless(AutoConfig.from_pretrained(folder, trust_remote_code=False))
        check_heads(folder / "config.json", config)
        check_size(folder, config)
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        model.tie_weights()
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except KvcalError:
        raise
    except Exception as error:  # nothing of ours runs inside, so it is the folder's fault
        reason = " ".join(str(error).split())[:200]
        raise KvcalError(f"{folder}: its config cannot be loaded ({reason}): export the model again") from error
    # Uninitialised weights may be NaN, which would spread into the checks of `share`.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def _check_complete(folder: Path, model: Any, stored: Collection[str]) -> None:
    """Raises KvcalError: weights that the file lacks, or that the model has no place for.

    Args:
        stored: names of the file's tensors.
    """
    by_tensor: dict[int, set[str]] = {}
    needed: dict[str, Tensor] = model.state_dict(keep_vars=True)
    for name, tensor in needed.items():
        by_tensor.setdefault(id(tensor), set()).add(name)
    lacking = sorted(min(names) for names in by_tensor.values() if not names & set(stored))
    unknown = sorted(set(stored) - needed.keys())
    for problem, names in (("lacks", lacking), ("has unexpected", unknown)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise KvcalError(f"{folder / WEIGHTS}: {problem} {names[0]}{more}: export the model again")
