"""The file that makes a checkpoint folder one of a model whose layers share keys and values; no transformers here."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...artifacts import KvcalError
from ...artifacts.plain_files import read_plain
from .sharing_map import SharingMap

NAME = "kvcal_cla.json"
WEIGHTS = "model.safetensors"
_VERSION = 1
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class ClaFile:
    """`kvcal_cla.json`, beside `config.json`, `model.safetensors` and the tokenizer's files.

    The weights are those of the shared model, by their names in it: no keys' and values' projections of reading layers.
    """

    sharing_map: SharingMap
    dtype: str
    """Of the weights, e.g. "bfloat16"."""
    origin: dict[str, Any] = field(default_factory=dict)
    """For people: the original model, the artifact, pool and training. Readers ignore it."""

    def dumps(self) -> bytes:
        body = {"format": "kvcal-cla", "version": _VERSION, "groups": str(self.sharing_map), "dtype": self.dtype}
        return json.dumps({**body, "origin": self.origin}, indent=1).encode() + b"\n"

    @classmethod
    def read(cls, folder: Path) -> ClaFile:
        """Raises KvcalError: no such file, damaged, or of a newer version."""
        path = folder / NAME
        try:
            body = json.loads(read_plain(path, _MAX_BYTES))
            version, groups, dtype, origin = body["version"], body["groups"], body["dtype"], body.get("origin") or {}
            good = isinstance(groups, str) and isinstance(dtype, str) and isinstance(origin, dict)
            if body["format"] != "kvcal-cla" or not good:
                raise ValueError("format, groups, dtype or origin")
        except (FileNotFoundError, NotADirectoryError):
            raise KvcalError(
                f"{folder}: has no {NAME}: give a folder that `calibrate export ARTIFACT --model MODEL --cla DIR` wrote"
            ) from None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise KvcalError(f"{path}: cannot be read ({error}): export the model again") from error
        if version != _VERSION:
            raise KvcalError(
                f"{path}: version {version!r}, this kvcal reads {_VERSION}: upgrade kvcal, or export again"
            )
        return cls(SharingMap.parse(groups), dtype, origin)
