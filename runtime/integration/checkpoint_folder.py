"""A checkpoint's folder as a stranger may have sent it: checked before transformers, which believes it, reads it."""

from __future__ import annotations

import copy
import errno
import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from ...artifacts import KvcalError
from .checkpoint_json import PLAIN, check_config, check_tokenizer

CHECKED = ("config.json", "tokenizer_config.json", "adapter_config.json", "*.index.json")
"""Files, as patterns, that `check_folder` reads."""
_READ = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja")
_MOST_BYTES = 64 << 20


def check_folder(folder: Path) -> None:
    """Refuse what would make transformers read outside of the folder, ask the network, or build nonsense.

    Raises:
        KvcalError: names the file and the entry.
    """
    for path in _files(folder):
        if path.is_symlink() and path.suffix in _READ:
            _check_inside(folder, path, path.name)
        if re.match(r"shard-\d{5}-model-", path.name):
            raise KvcalError(f"{path}: part of a distributed checkpoint: load it where it was made and save it whole")
    if (folder / "adapter_config.json").exists():
        raise KvcalError(f"{folder}: has an adapter beside the model: merge it (merge_and_unload) and save the result")
    for name, check in (("config.json", check_config), ("tokenizer_config.json", check_tokenizer)):
        if (folder / name).is_file():
            check(folder / name, _read(folder / name))
    for index in sorted(folder.glob("*.index.json")):
        shards(index)


def shards(index: Path) -> list[str]:
    """The files that a `….index.json` names, which lie in its folder.

    Raises:
        KvcalError: no such file, or one that leads out of the folder.
    """
    weight_map = _read(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise KvcalError(f"{index}: weight_map: expected a file for every weight: fetch it again")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not all(PLAIN.fullmatch(part) and len(part) <= 255 for part in name.split("/")):
            raise KvcalError(f"{index}: {name[:200]!r}: expected a file in this folder: fetch it again")
        _check_inside(index.parent, index.parent / name, name)
    return names


def check_size(folder: Path, config: Any) -> None:
    """Refuse a config of far more weights than the files can hold: transformers would make up what they lack.

    Raises:
        KvcalError: more weights than the files have bits.
    """
    stored = sum(path.stat().st_size for path in _files(folder) if path.suffix in (".safetensors", ".bin"))
    described = weights_of(config)
    if stored and described is not None and described > 8 * stored:
        raise KvcalError(
            f"{folder}: config.json describes a model of {described:.3g} weights, the files have {stored} bytes: "
            "get a whole checkpoint"
        )


def weights_of(config: Any) -> int | None:
    """How many weights the model of a config has, tied ones once; None: it cannot be built."""
    try:
        with torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
        model.tie_weights()
    except Exception:  # said better where the weights are loaded
        return None
    return sum(parameter.numel() for parameter in model.parameters())


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "is no plain file")  # a pipe would be waited for
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES + 1)
        body = json.loads(text) if len(text) <= _MOST_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise KvcalError(f"{path}: cannot be loaded ({reason}): fetch it again") from None
    if not isinstance(body, dict):
        raise KvcalError(f"{path}: cannot be loaded (a JSON object is expected): fetch it again")
    return body


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise KvcalError(f"{folder}: cannot be read ({error.strerror}): check who may") from None


def _check_inside(folder: Path, path: Path, name: str) -> None:
    """A link may lead to the blobs of a Hub cache, whose snapshots are made of such links, and nowhere else outside."""
    place = path.resolve()
    of_the_hub = place.parent.name == "blobs" and place.parent.parent.name.startswith(("models--", "datasets--"))
    if not (of_the_hub or place.is_relative_to(folder.resolve())):
        raise KvcalError(f"{folder}: {name} is a link out of this folder: give the folder that the file itself is in")
