"""Whether the text of an evaluation is the one that an artifact was calibrated on, by what is noted of both."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from glob import has_magic
from pathlib import Path
from typing import Any


def overlap(calibrated: Mapping[str, Any], evaluated: Mapping[str, Any]) -> str | None:
    """The first text that both have read; None: none that is known by its name.

    Args:
        calibrated: `data` of an artifact's manifest.
        evaluated: `source` of prompts.
    """
    source = calibrated.get("source")
    seen = {name for name, _ in _names(source)} if isinstance(source, Mapping) else set()
    return next((shown for name, shown in _names(evaluated) if name in seen), None)


def _names(source: Mapping[str, Any]) -> Iterator[tuple[Any, str]]:
    """(identity, name for messages) of each file or split that was read."""
    for each in source.get("sources", [source]):
        name = str(each.get("id"))
        if each.get("kind") != "local":
            if name != "None":
                yield (name, each.get("config"), each.get("split")), name
            continue
        path = Path(name)
        while has_magic(str(path)) and not path.exists():
            path = path.parent
        folder = path.parent if path.is_file() else path
        for file in each.get("files", []):
            yield os.path.realpath(folder / str(file)), str(file)
        if not each.get("files"):
            yield (name, each.get("split")), name
