"""Open text by alias, Hub id or path, as a stream of documents."""

from __future__ import annotations

import difflib
import glob
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifacts import KvcalError
from ..runtime import hub
from .builtin import stdlib_text
from .text_files import KNOWN, extension, matching, read, readable, texts

DATA_ALIASES: dict[str, str] = {
    "c4": "allenai/c4:en:train",
    "stdlib": "built in: this Python's documentation and source, splits train and heldout",
    "wikitext": "Salesforce/wikitext:wikitext-2-raw-v1:train",
    "wikitext-103": "Salesforce/wikitext:wikitext-103-raw-v1:train",
}

_FILES_LISTED = 100


@dataclass(frozen=True)
class TextData:
    """Documents, to be iterated over any number of times."""

    source: dict[str, Any]
    """JSON-able: kind (builtin, hub, local), id, and what else is known of config, split, revision, files."""
    documents: Callable[[], Iterator[str]]

    def __iter__(self) -> Iterator[str]:
        empty = True
        for document in self.documents():
            if document and not document.isspace():
                empty = False
                yield document
        if empty:
            raise KvcalError(f"data {self.source['id']}: contains no text: give other data")


def open_data(spec: str | os.PathLike[str], split: str | None = None) -> TextData:
    """Find text and read its beginning, so that most faults show at once.

    Args:
        spec: a file, folder or glob of .txt .md .py (a file is a document) and .jsonl .json .parquet (a row
            is one); a folder with a dataset card that lists its files, or a Hub id, `[:config[:split]]`; an alias.
        split: overrides the one in `spec`.

    Raises:
        KvcalError: nothing there, not text, damaged, no such split, or neither here nor to be had online.
    """
    name = os.fspath(spec)
    if not name.strip():
        raise KvcalError("data: an empty name: give a file, folder, glob, Hub id or alias")
    data = _local(name, split)
    if data is None:
        alias, _, rest = name.partition(":")
        if alias == "stdlib":
            return _builtin(split or rest or "train")
        if alias in DATA_ALIASES:
            name, split = DATA_ALIASES[alias], split or rest or None
        data = _hub(name, split)
    next(iter(data))
    return data


def _builtin(split: str) -> TextData:
    _choose("stdlib", "split", split, stdlib_text.SPLITS)
    source = {"kind": "builtin", "id": "stdlib", "split": split}
    return TextData(source, lambda: (text for _, text in stdlib_text.documents(split)))


def _local(spec: str, split: str | None) -> TextData | None:
    """What `spec` means on the disk; None when nothing is there under this name."""
    path = hub.path_of(spec)
    address, config, wanted = _parts(spec)
    folder = hub.path_of(address)
    if folder.is_dir() and (path == folder or not path.exists()) and _card(folder):
        return _repository(address, folder, config, split or wanted)
    if path.is_file():
        base, names = path.parent, [path.name]
    elif path.is_dir():
        base, names = path, [name for name in matching(path, "**/*") if extension(name) in KNOWN]
    elif glob.has_magic(spec):
        base = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
        names = matching(base, str(path.relative_to(base)))
    else:
        return None
    if not names and spec in DATA_ALIASES:
        return None
    if not names:
        raise KvcalError(f"data {spec}: no files with text there (of {' '.join(KNOWN)}): check the path")
    if split is not None:
        raise KvcalError(f"data {spec}: local files have no splits ({split!r} asked for): drop --split")
    return _from_files({"kind": "local", "id": spec}, base, names)


def _hub(spec: str, split: str | None) -> TextData:
    address, config, wanted = _parts(spec)
    split = split or wanted
    repo_id, _, revision = address.partition("@")
    if extension(repo_id) in KNOWN or repo_id.startswith((".", "/", "~")) or repo_id.count("/") > 1:
        raise KvcalError(f"data {spec}: no such file or folder: check the path")
    if "/" not in repo_id:
        near = difflib.get_close_matches(repo_id, DATA_ALIASES, n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise KvcalError(
            f"unknown data {spec!r}: {hint}Give a file, folder or glob, a Hub id org/name[:config[:split]], "
            f"or one of {', '.join(DATA_ALIASES)}"
        )

    def lacking(folder: Path) -> str | None:
        try:
            _repository(repo_id, folder, config, split)
        except _NoFiles:
            return f"the files of config {config or 'default'}, split {split or 'train'}"
        return None

    found = hub.locate(repo_id, "dataset", revision or None, lacking)
    return _repository(repo_id, found.folder, config, split, found.revision)


class _NoFiles(KvcalError):
    """A repository folder without the files that its card promises: a partial download."""


def _repository(
    name: str, folder: Path | None, config: str | None, split: str | None, revision: str | None = None
) -> TextData:
    """A data set as the Hub lays it out, in a folder or (None) online."""
    source: dict[str, Any] = {"kind": "hub" if revision else "local", "id": name}
    if folder and (card := _card(folder)):
        # Not load_dataset(folder, config): that fails when the files of any other config are missing,
        # which they are in a cache that holds one config.
        config = _choose(name, "config", config, card, "default")
        split = _choose(name, "split", split, card[config], "train")
        names = sorted({found for pattern in card[config][split] for found in matching(folder, pattern)})
        if not names:
            raise _NoFiles(f"data {name}: no files of config {config}, split {split} in {folder}: download them")
        if all(extension(found) in KNOWN for found in names):
            return _from_files(source | {"config": config, "split": split, "revision": revision}, folder, names)
    elif folder and not any(extension(found) not in ("", ".md") for found in matching(folder, "**/*")):
        raise _NoFiles(f"data {name}: no data files in {folder}: download them")

    from datasets import load_dataset

    options = {} if folder else {"revision": revision}
    with readable(f"data {name}"), tempfile.TemporaryDirectory() as nowhere:
        splits = load_dataset(str(folder or name), config, streaming=True, cache_dir=nowhere, **options)
    chosen = _choose(name, "split", split, splits, "train")
    source |= {"config": config, "split": chosen, "revision": revision}
    return TextData(source, lambda: _articles(name, texts(splits[chosen], f"data {name}")))


def _card(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Config -> split -> file patterns, as the dataset card in `folder` states them; {} if it does not."""
    from huggingface_hub import metadata_load

    if not (folder / "README.md").is_file():
        return {}
    found: dict[str, dict[str, list[str]]] = {}
    try:
        for entry in (metadata_load(folder / "README.md") or {}).get("configs", []):
            files = entry["data_files"]
            if isinstance(files, list) and isinstance(files[0], dict):
                files = {item["split"]: item["path"] for item in files}
            splits = files if isinstance(files, dict) else {"train": files}
            found[entry["config_name"]] = {
                split: [paths] if isinstance(paths, str) else list(paths) for split, paths in splits.items()
            }
    except Exception:  # any README may lie in a folder: one that is no such card states nothing
        return {}
    return found


def _from_files(source: dict[str, Any], base: Path, names: Sequence[str]) -> TextData:
    unknown = [name for name in names if extension(name) not in KNOWN]
    if unknown:
        raise KvcalError(f"data {source['id']}: {unknown[0]} is none of {' '.join(KNOWN)}: convert it, or leave it out")
    paths = [base / name for name in names]
    described = {**source, "files": list(names[:_FILES_LISTED]), "num_files": len(names)}
    return TextData(described, lambda: _articles(source["id"], (text for path in paths for text in read(path))))


def _articles(name: str, rows: Iterable[str]) -> Iterator[str]:
    """Put wikitext's rows, which are lines, together again: an article starts with " = Its title = "."""
    if name != "Salesforce/wikitext":
        yield from rows
        return
    lines: list[str] = []
    for row in rows:
        if row.startswith(" = ") and not row.startswith(" = =") and lines:
            yield "".join(lines)
            lines = []
        lines.append(row)
    yield "".join(lines)


def _choose(data: str, kind: str, wanted: str | None, known: Iterable[str], default: str | None = None) -> str:
    names = list(known)
    choice = wanted or (default if default in names else names[0] if len(names) == 1 else None)
    if choice is None or choice not in names:
        problem = f"no {kind} {wanted!r}" if wanted else f"several {kind}s"
        raise KvcalError(f"data {data}: {problem}: choose one of {', '.join(names)}")
    return choice


def _parts(spec: str) -> tuple[str, str | None, str | None]:
    """(address, config, split) of `address[:config[:split]]`."""
    address, _, rest = spec.partition(":")
    config, _, split = rest.partition(":")
    return address, config or None, split or None
