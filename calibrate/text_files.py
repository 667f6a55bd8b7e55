"""Text in files on the disk: which ones are read, and the documents of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..artifacts import KvcalError
from ..artifacts.packages import require
from ..runtime import hub
from . import text_columns
from .chats import Chat
from .html_text import charset, page_text
from .raw_text import COMPRESSIONS, first_bytes, text_chunks
from .tables import Table, kinds_of_schema, open_table, table_of_values

WEB = (".html", ".htm", ".xhtml")
PLAIN = (".txt", ".md", ".py", *WEB)
_TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
KNOWN = (*PLAIN, *_TABLES)
_NOT_COMPRESSED = (".parquet", ".arrow")


class Unfinished(str):
    """The beginning of a document that goes on in the next string."""


def kind(name: str) -> str:
    """The file name's ending in lower case, without that of a compression: ".txt" also of "a.txt.gz"."""
    path = Path(name)
    return Path(path.stem if path.suffix.lower() in COMPRESSIONS else name).suffix.lower()


def is_text(name: str) -> bool:
    """Whether a file of this name is read."""
    compressed = Path(name).suffix.lower() in COMPRESSIONS
    return kind(name) in KNOWN and not (compressed and kind(name) in _NOT_COMPRESSED)


def describes_others(name: str) -> bool:
    """Whether a file that `datasets` saved beside the text of a data set holds no text itself."""
    file = Path(name).name
    cached = file.startswith(("cache-", "tmp")) and file.endswith(".arrow")
    return cached or file in ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")


def not_text(name: str) -> str:
    """What to do about a file that is not read."""
    known = f"none of {' '.join(KNOWN)}, also compressed ({' '.join(COMPRESSIONS)})"
    unpack = Path(name).suffix.lower() in (".zip", ".tar", ".tgz", ".7z", ".rar") or kind(name) == ".tar"
    return f"{name} is {known}: {'unpack it' if unpack else 'convert it, or leave it out'}"


def matching(folder: Path, pattern: str) -> list[str]:
    """Files in `folder`, hidden ones apart, as sorted relative paths with forward slashes."""
    try:
        found = [path.relative_to(folder) for path in folder.glob(pattern) if path.is_file()]
    except (ValueError, NotImplementedError):  # no glob pattern, or one that leads outside
        return []
    except OSError as error:
        raise KvcalError(f"{error.filename or folder}: cannot be read ({error.strerror}): check who may") from None
    return sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))


def below(folder: Path) -> tuple[list[str], list[str]]:
    """(files in `folder` and its folders, what else is there), without hidden ones, as `matching` has them.

    Links to folders, which may lead in circles, and links to nothing are of the second kind.
    """

    def refuse(error: OSError) -> None:
        raise KvcalError(f"{error.filename or folder}: cannot be read ({error.strerror}): check who may") from None

    files, others = [], []
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in [*folders, *(name for name in names if not name.startswith("."))]:
            path = Path(place, name)
            shown = path.relative_to(folder).as_posix()
            try:
                if path.is_file():
                    files.append(shown)
                    continue
                if path.is_dir() and not path.is_symlink():
                    continue
            except OSError:  # in a folder that may be listed and not entered
                pass
            others.append(shown)
    return sorted(files), sorted(others)


def read(path: Path, text_column: str | None = None) -> Iterator[str | Chat]:
    """The documents of one file: a plain file is one, in pieces where it is long; a table has one per row.

    Raises:
        KvcalError: not text, damaged, or without a column that is plainly the text.
    """
    if kind(path.name) in PLAIN:
        held: str | None = None
        for chunk in _chunks(path):
            if held is not None:
                yield Unfinished(held)
            held = chunk
        yield held or ""
    elif path.stat().st_size:
        with readable(str(path)):
            table = open_table(path, kind(path.name))
        yield from text_columns.documents(_guarded(table, str(path)), str(path), text_column)


def _chunks(path: Path) -> Iterator[str]:
    if kind(path.name) not in WEB:
        return text_chunks(path)
    return page_text(str(path), text_chunks(path, charset(str(path), first_bytes(path))))


def texts(dataset: Any, label: str, text_column: str | None = None) -> Iterator[str | Chat]:
    """The documents of a streaming data set of `datasets`."""

    def rows() -> Iterator[Any]:
        iterator = iter(dataset)
        while True:
            with quiet():
                row = next(iterator, None)
            if row is None:
                return
            yield row

    with readable(label):
        if dataset.features:
            table = Table(kinds_of_schema(dataset.features.arrow_schema), lambda columns: rows())
        else:
            table = table_of_values(rows())
    yield from text_columns.documents(_guarded(table, label), label, text_column)


def _guarded(table: Table, label: str) -> Table:
    """The table, with one line for damage that shows only while its rows are read."""

    def rows(columns: Any) -> Iterator[Any]:
        with readable(label):
            iterator = table.rows(columns)
        while True:
            with readable(label):
                row = next(iterator, None)
            if row is None:
                return
            yield row

    return Table(table.kinds, rows)


@contextmanager
def readable(label: str) -> Iterator[None]:
    """One line for whatever goes wrong while a library reads."""
    try:
        yield
    except KvcalError:
        raise
    except Exception as error:  # nothing of ours runs inside, so it is the data's or the network's fault
        raise KvcalError(f"{label}: cannot be read ({hub.one_line(error)}): check it, or give other data") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep `datasets` from printing anything, and from requests that are not for what it loads."""
    require("datasets", to="read this data")
    import datasets

    verbosity, bars = datasets.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    counting = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.logging.set_verbosity(datasets.logging.CRITICAL + 1)
    datasets.disable_progress_bars()
    # Otherwise load_dataset sends a request before it opens even a local file.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counting
        if bars:
            datasets.enable_progress_bars()
