"""A checkpoint's folder, which a stranger may have made: checked before transformers, which trusts it, reads it."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from ...artifacts import KvcalError
from .checkpoint_files import check_inside, read_json, shards
from .checkpoint_json import check_config, check_tokenizer

CHECKED = ("config.json", "tokenizer_config.json", "adapter_config.json", "*.index.json")
"""Files, as patterns, that `check_folder` reads."""
_READ = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja")


def check_folder(folder: Path) -> None:
    """Refuse what would make transformers read outside of the folder, ask the network, or build nonsense.

    Raises:
        KvcalError: names the file and the entry.
    """
    for path in _files(folder):
        if path.is_symlink() and path.suffix in _READ:
            check_inside(folder, path, path.name)
        if re.match(r"shard-\d{5}-model-", path.name):
            raise KvcalError(f"{path}: part of a distributed checkpoint: load it where it was made and save it whole")
    if (folder / "adapter_config.json").exists():
        raise KvcalError(f"{folder}: has an adapter beside the model: merge it (merge_and_unload) and save the result")
    for name, check in (("config.json", check_config), ("tokenizer_config.json", check_tokenizer)):
        if (folder / name).is_file():
            check(folder / name, read_json(folder / name))
    for index_file in sorted(folder.glob("*.index.json")):
        shards(index_file)


def check_size(folder: Path, config: Any) -> None:
    """Refuse a config of far more weights than the files can hold: transformers would make up what they lack.

    Raises:
        KvcalError: more weights than the files have bits.
    """
    stored = sum(path.stat().st_size for path in _files(folder) if path.suffix in (".safetensors", ".bin"))
    described = weights_of(config)
    if stored and described is not None and described > 8 * stored:
        raise KvcalError(
            f"{folder}: config.json describes a model of {described:.0f} weights, the files have {stored} bytes: "
            "get a whole checkpoint"
        )


def weights_of(config: Any) -> int | None:
    """How many weights the model of a config has, tied ones once; None: it cannot be built."""
    try:
        with torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
        model.tie_weights()
    except Exception:  # loading the weights gives a better message
        return None
    return sum(parameter.numel() for parameter in model.parameters())


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise KvcalError(f"{folder}: cannot be read ({error.strerror}): check who may") from None
