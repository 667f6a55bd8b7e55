"""The text `stdlib`: what every CPython ships, split by file into train and held-out parts.

Three kinds of document: the pydoc topics (English reference text), the docstrings of each
standard-library module (English), and its source (code). A file's docstrings and its source
always fall into the same part, so nothing held out is seen in training.

The text is that of the running interpreter and so differs between Python versions; artifacts
record its content hash.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

SPLITS = ("train", "heldout")
HELD_OUT_ONE_IN = 10

# Left out: tests, what a machine or distribution adds, and tables that are not text.
_EXCLUDED_FOLDERS = {
    *("__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"),
    *("encodings", "pydoc_data", "_bundled", "__phello__"),
}
_EXCLUDED_PREFIXES = ("config-", "_sysconfigdata", "lib-dynload")


def is_held_out(name: str) -> bool:
    """Whether the document `name` (a path with forward slashes) belongs to the held-out part."""
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def documents(split: str = "train") -> Iterator[tuple[str, str]]:
    """Yield (name, text) of one split, in an order that depends on names only."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} of the built-in text: expected one of {', '.join(SPLITS)}")
    held_out = split == "heldout"
    readers: dict[str, Callable[[], str]] = {name: functools.partial(str, text) for name, text in _topics().items()}
    for name, path in _source_files().items():
        readers[name] = functools.partial(path.read_text, encoding="utf-8", errors="replace")
        readers[f"{name}#docstrings"] = functools.partial(_docstrings_of, path)
    # By hash, so that code and English alternate and any prefix of the stream is a fair sample.
    for name in sorted(readers, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if is_held_out(name.removesuffix("#docstrings")) == held_out and (text := readers[name]()):
            yield name, text


def docstrings(source: str) -> str:
    """All docstrings of a module's source, in order of appearance; "" when it does not parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, owners))
    return "\n\n".join(doc for doc in found if doc)


def _docstrings_of(path: Path) -> str:
    return docstrings(path.read_text(encoding="utf-8", errors="replace"))


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some minimal Python packages leave it out
        return {}
    return {f"topics/{name}": text for name, text in topics.items()}


@functools.cache
def _source_files() -> dict[str, Path]:
    """Name -> file; looked for once, which takes half a second."""
    root = Path(sysconfig.get_path("stdlib"))
    named = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if not _EXCLUDED_FOLDERS.intersection(parts) and not parts[0].startswith(_EXCLUDED_PREFIXES):
            named["/".join(parts)] = path
    return named
