"""Write a model whose layers share keys and values as a checkpoint folder, which `load_cla` loads."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...artifacts import KvcalError
from ...artifacts.writing import new_folder, save_tensors
from ..integration.routing import kind
from .file import NAME, WEIGHTS, ClaFile
from .sharing import sharing_of


def save_cla(model: Any, folder: str | os.PathLike[str]) -> Path:
    """Write config, weights and groups of a model whose layers share keys and values now; its tokenizer is not written.

    The folder appears whole or not at all. Returns it.

    Raises:
        KvcalError: layers share nothing, something is at `folder`, or the disk is full.
    """
    folder = Path(folder)
    with new_folder(folder) as building:
        write_cla(model, building, {})
    return folder


def write_cla(model: Any, folder: Path, origin: Mapping[str, Any]) -> None:
    """Write the files of `save_cla` into an empty folder.

    Args:
        origin: for people, see `ClaFile`.
    """
    sharing = sharing_of(model)
    if sharing is None:
        raise KvcalError(f"{kind(model)}: its layers share nothing: save it with model.save_pretrained(DIR)")
    save_tensors(folder / WEIGHTS, _distinct(model.state_dict(keep_vars=True)))
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        # Not save_pretrained: it refuses some settings that published models do have.
        settings = json.dumps(model.generation_config.to_diff_dict(), indent=1)
        (folder / "generation_config.json").write_text(settings + "\n", "utf-8")
    header = ClaFile(sharing.map, str(model.dtype).removeprefix("torch."), dict(origin))
    (folder / NAME).write_bytes(header.dumps())


def _distinct(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tied weights once, under the first of their names."""
    first = {id(tensor): name for name, tensor in reversed(state.items())}
    return {name: tensor for name, tensor in state.items() if first[id(tensor)] == name}
