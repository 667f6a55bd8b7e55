"""Read text from files on the disk: plain ones by ourselves, tables by `datasets`' builders."""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..artifacts import KvcalError
from ..runtime import hub

_PLAIN = (".txt", ".md", ".py")
_TABLES = {".jsonl": "json", ".json": "json", ".jsonl.gz": "json", ".json.gz": "json", ".parquet": "parquet"}
KNOWN = (*_PLAIN, *_TABLES)


def extension(name: str) -> str:
    """The file name's ending in lower case, with what .gz wraps: ".txt", ".jsonl.gz", or ""."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    return "".join(suffixes[-2:] if suffixes[-1:] == [".gz"] else suffixes[-1:])


def matching(folder: Path, pattern: str) -> list[str]:
    """Files in `folder`, hidden ones apart, as sorted relative paths with forward slashes."""
    try:
        found = [path.relative_to(folder) for path in folder.glob(pattern) if path.is_file()]
    except (ValueError, NotImplementedError):  # no glob pattern, or one that leads outside
        return []
    except OSError as error:
        raise KvcalError(f"{error.filename or folder}: cannot be read ({error.strerror}): check who may") from None
    return sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))


def read(path: Path) -> Iterator[str]:
    """The documents of one file: a plain file is one, a table has one per row.

    Raises:
        KvcalError: not text, damaged, or without a text column.
    """
    kind = extension(path.name)
    if kind in _PLAIN:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise KvcalError(
                f"{path}: not UTF-8 text ({error.reason} at byte {error.start}): convert it, or leave it out"
            ) from None
        except OSError as error:
            raise KvcalError(f"{path}: cannot be read ({error.strerror})") from None
        if "\0" in text:
            raise KvcalError(f"{path}: binary data, not text: leave it out")
        yield text
    elif path.stat().st_size:
        from datasets import load_dataset

        # Row groups may be huge or empty; the builder's default is to read the first one whole.
        options = {"batch_size": 1000} if kind == ".parquet" else {}
        files = [glob.escape(str(path.absolute()))]
        # A cache folder of its own: even streaming leaves a lock file in it.
        with readable(str(path)), tempfile.TemporaryDirectory() as nowhere:
            rows = load_dataset(
                _TABLES[kind], data_files=files, split="train", streaming=True, cache_dir=nowhere, **options
            )
        yield from texts(rows, str(path))


def texts(rows: Any, label: str) -> Iterator[str]:
    """The text column of a streaming dataset."""
    iterator = iter(rows)
    column = None
    while True:
        with readable(label):
            row = next(iterator, None)
        if row is None:
            return
        column = column or _text_column(rows.features, row, label)
        if not isinstance(text := row.get(column), (str, type(None))):
            raise KvcalError(f"{label}: column {column!r} holds {type(text).__name__}, not text: give other data")
        yield text or ""


def _text_column(features: Any, row: dict[str, Any], label: str) -> str:
    kinds = {name: getattr(kind, "dtype", "nested") for name, kind in (features or {}).items()}
    kinds = kinds or {name: "string" if isinstance(value, str) else "other" for name, value in row.items()}
    strings = [name for name, kind in kinds.items() if "string" in kind]
    for name in ("text", "content"):
        if name in strings:
            return name
    if len(strings) != 1:
        listed = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise KvcalError(
            f"{label}: no column 'text' or 'content', nor a single one of strings, among {listed}: rename one"
        )
    return strings[0]


@contextmanager
def readable(label: str) -> Iterator[None]:
    """One line for whatever goes wrong while `datasets` reads, and silence beside it."""
    import datasets

    verbosity, bars = datasets.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    counting = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.logging.set_verbosity(datasets.logging.CRITICAL + 1)
    datasets.disable_progress_bars()
    # Otherwise load_dataset sends a request before it opens even a local file.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    except Exception as error:  # nothing of ours runs inside, so it is the data's or the network's fault
        raise KvcalError(f"{label}: cannot be read ({hub.one_line(error)}): check it, or give other data") from error
    finally:
        datasets.logging.set_verbosity(verbosity)
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counting
        if bars:
            datasets.enable_progress_bars()
