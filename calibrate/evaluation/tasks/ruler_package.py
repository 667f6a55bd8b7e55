"""RULER as `nvidia-long-context-eval` has it: its tasks and its scoring, read where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from ....artifacts import KvcalError

PACKAGE = "nvidia-long-context-eval"
VERSION = "26.3"
"""The one that the tests pass with."""
NAMES = (
    *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
)
INSTALL = f"pip install 'kvcal[ruler]' && pip install --no-deps {PACKAGE}=={VERSION}"


@dataclass(frozen=True)
class RulerTask:
    """One of RULER's tasks, as the package describes it."""

    kind: str
    """The script's name: niah, variable_tracking, …"""
    arguments: dict[str, Any]
    """Of the script."""
    new_tokens: int
    template: str
    """With {context} and what the script fills in."""
    answer_prefix: str
    """With which the answer begins."""
    scoring: str
    """A name in `SCORINGS`."""


def installed_version() -> str:
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return "unknown"


@cache
def root() -> Path:
    found = importlib.util.find_spec("long_context_eval")
    if found is None or not found.origin:
        raise KvcalError(f"RULER's tasks are written by the package {PACKAGE}, which is not installed: {INSTALL}")
    return Path(found.origin).parent


def ruler_tasks() -> dict[str, RulerTask]:
    """All of them by name.

    Raises:
        KvcalError: the package is not installed, or another version has something else in its place.
    """
    import yaml

    folder = root()
    try:
        listed = yaml.safe_load((folder / "synthetic.yaml").read_text(encoding="utf-8"))
        kinds = _load(folder / "data" / "synthetic" / "constants.py").TASKS
        scored = _load(folder / "eval" / "synthetic" / "constants.py").TASKS
        found = {
            name: RulerTask(
                kind=(kind := listed[name]["task"]),
                arguments=dict(listed[name]["args"]),
                new_tokens=int(kinds[kind]["tokens_to_generate"]),
                template=kinds[kind]["template"],
                answer_prefix=kinds[kind]["answer_prefix"],
                scoring=scored[kind]["metric_fn"].__name__,
            )
            for name in NAMES
        }
    except Exception as error:
        raise _other_version(f"{type(error).__name__}: {error}") from None
    return found


def metric(name: str, prediction: str, answers: Sequence[str]) -> float:
    """The package's score of one prediction, 0 to 1."""
    found = getattr(_scoring(), f"{name}_per_sample", None)
    if found is None:
        raise _other_version(f"no {name}_per_sample")
    return float(found([prediction], [list(answers)])[0]) / 100


@cache
def _scoring() -> Any:
    return _load(root() / "eval" / "synthetic" / "constants.py")


def _load(path: Path) -> Any:
    """A file as a module of its own, without the package around it, which needs much that we do not."""
    spec = importlib.util.spec_from_file_location(f"ruler_{path.parent.parent.name}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def _other_version(what: str) -> KvcalError:
    return KvcalError(
        f"{PACKAGE} {installed_version()} is not as kvcal knows it ({what}): pip install --no-deps {PACKAGE}=={VERSION}"
    )
