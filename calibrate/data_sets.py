"""Data sets of several files: as the Hub lays them out, on the disk or online, and as `datasets` saves them."""

from __future__ import annotations

import dataclasses
import json
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifacts import KvcalError
from .text_data import Document, TextPart, TextSource
from .text_files import PLAIN, is_text, kind, matching, quiet, read, readable, texts

_MOST_FILES = 16
"""Files of a data set that one wave reads: on the Hub each is a download."""


@dataclass(frozen=True)
class Asked:
    """What `open_data` was asked for, beside the name."""

    split: str | None
    text_column: str | None
    seed: int

    def of_split(self, split: str | None) -> Asked:
        return dataclasses.replace(self, split=split)


class NoFiles(KvcalError):
    """A repository folder without the files that its card promises: a partial download."""


def source_of_files(
    described: dict[str, Any],
    base: Path,
    names: Sequence[str],
    asked: Asked,
    skipped: Sequence[str] = (),
    waves: Sequence[int] | None = None,
) -> TextSource:
    """A source that has each file as a part."""
    column = asked.text_column if any(kind(name) not in PLAIN for name in names) else None
    parts = tuple(
        _part(described["id"], base / name, name, column, wave)
        for name, wave in zip(names, waves or [0] * len(names), strict=True)
    )
    described = described | ({"text_column": column} if column is not None else {})
    return TextSource(described, parts, skipped)


def _part(data: str, path: Path, name: str, column: str | None, wave: int) -> TextPart:
    return TextPart(name, lambda: _articles(data, read(path, column)), path, wave)


def saved(name: str, folder: Path, asked: Asked) -> TextSource | None:
    """The source of a folder that `save_to_disk` wrote, for a data set or a dict of them; None for another folder."""
    described: dict[str, Any] = {"kind": "local", "id": name}
    if (folder / "dataset_dict.json").is_file():
        splits = _json(folder / "dataset_dict.json").get("splits")
        if not isinstance(splits, list) or not all(isinstance(one, str) and Path(one).name == one for one in splits):
            raise KvcalError(f"{folder / 'dataset_dict.json'}: has no list of splits: save the data set again")
        split = choose(name, "split", asked.split, splits, "train")
        described["split"] = split
        folder = folder / split
    elif not ((folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()):
        return None
    elif asked.split is not None:
        raise KvcalError(f"data {name}: was saved without splits ({asked.split!r} asked for): drop the split")
    files = _json(folder / "state.json").get("_data_files")
    files = files if isinstance(files, list) else []
    present = matching(folder, "*.arrow")
    names = [file.get("filename") if isinstance(file, dict) else None for file in files]
    missing = [file for file in names if file not in present]
    if missing or not names:
        lacks = f"has not got {missing[0]!r}" if missing else "names no files"
        raise KvcalError(f"data {name}: {folder / 'state.json'} {lacks}: copy or save the data set again")
    return source_of_files(described, folder, [str(file) for file in names], asked)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise KvcalError(f"{path}: cannot be read ({error}): save the data set again") from None
    return found if isinstance(found, dict) else {}


def repository(
    name: str, folder: Path | None, config: str | None, asked: Asked, revision: str | None = None
) -> TextSource:
    """A data set as the Hub lays it out, in a folder or (None) online.

    Of many files a few are drawn, the same online and on the disk; others are read only where these do not suffice.
    """
    described: dict[str, Any] = {"kind": "hub" if revision else "local", "id": name}
    if folder and (stated := card(folder)):
        # Not load_dataset(folder, config): that fails when the files of any other config are missing,
        # which they are in a cache that holds one config.
        config = choose(name, "config", config, stated, "default")
        split = choose(name, "split", asked.split, stated[config], "train")
        names = sorted({found for pattern in stated[config][split] for found in matching(folder, pattern)})
        if not names:
            raise NoFiles(f"data {name}: no files of config {config}, split {split} in {folder}: download them")
        if all(is_text(found) for found in names):
            described |= {"config": config, "split": split, "revision": revision}
            return source_of_files(described, folder, names, asked, waves=_waves(len(names), asked.seed))
    elif folder and not any(Path(found).suffix not in ("", ".md") for found in matching(folder, "**/*")):
        raise NoFiles(f"data {name}: no data files in {folder}: download them")

    from datasets import load_dataset

    options = {} if folder else {"revision": revision}
    with readable(f"data {name}"), quiet(), tempfile.TemporaryDirectory() as nowhere:
        splits = load_dataset(str(folder or name), config, streaming=True, cache_dir=nowhere, **options)
    split = choose(name, "split", asked.split, splits, "train")
    described |= {"config": config, "split": split, "revision": revision}
    described |= {"text_column": asked.text_column} if asked.text_column is not None else {}
    count = splits[split].num_shards
    return TextSource(
        described,
        tuple(
            _shard(name, splits[split], number, count, asked.text_column, wave)
            for number, wave in enumerate(_waves(count, asked.seed))
        ),
    )


def _waves(count: int, seed: int) -> list[int]:
    """The wave in which each file is read."""
    order = random.Random(f"kvcal files {seed}").sample(range(count), count)
    waves = [0] * count
    for place, number in enumerate(order):
        waves[number] = place // _MOST_FILES
    return waves


def _shard(name: str, split: Any, number: int, count: int, column: str | None, wave: int) -> TextPart:
    def documents() -> Iterator[Document]:
        rows = split.shard(num_shards=count, index=number) if count > 1 else split
        return _articles(name, texts(rows, f"data {name}", column))

    return TextPart(f"file {number + 1} of {count}" if count > 1 else None, documents, wave=wave)


def card(folder: Path) -> dict[str, dict[str, list[str]]]:
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


def _articles(name: str, rows: Iterator[Document]) -> Iterator[Document]:
    """Put wikitext's rows, which are lines, together again: an article starts with " = Its title = "."""
    if name != "Salesforce/wikitext":
        yield from rows
        return
    lines: list[str] = []
    for row in rows:
        if str(row).startswith(" = ") and not str(row).startswith(" = =") and lines:
            yield "".join(lines)
            lines = []
        lines.append(str(row))
    yield "".join(lines)


def choose(data: str, what: str, wanted: str | None, known: Iterable[str], default: str | None = None) -> str:
    """The wanted one of the known names; where none is wanted, the default or the only one."""
    names = list(known)
    choice = wanted or (default if default in names else names[0] if len(names) == 1 else None)
    if choice is None or choice not in names:
        problem = f"no {what} {wanted!r}" if wanted else f"several {what}s"
        raise KvcalError(f"data {data}: {problem}: choose one of {', '.join(names)}")
    return choice
