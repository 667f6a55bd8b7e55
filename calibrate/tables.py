"""Rows of tables on the disk, streamed: JSON, CSV, Parquet and Arrow files."""

from __future__ import annotations

import csv
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifacts import KvcalError
from .chats import looks_like_chat
from .json_rows import json_values
from .raw_text import MOST_CHARS, text_chunks

TEXT, CHAT, NULL = "string", "messages", "null"
"""Kinds of columns; all others are the names of their types."""
_PEEKED = 100
_ROWS = 256


@dataclass(frozen=True)
class Table:
    kinds: Mapping[str, str]
    """Column -> kind."""
    rows: Callable[[Sequence[str]], Iterator[Mapping[str, Any]]]
    """Gives the rows, with the named columns at least; to be called once."""


def open_table(path: Path, kind: str) -> Table:
    """Open a table; `kind` is its name's ending, without that of a compression. Raises KvcalError: damaged."""
    if kind in (".jsonl", ".ndjson", ".json"):
        return table_of_values(json_values(path, kind == ".json"))
    if kind in (".csv", ".tsv"):
        return _csv(path, "," if kind == ".csv" else "\t")
    return _parquet(path) if kind == ".parquet" else _arrow(path)


def table_of_values(rows: Iterator[Mapping[str, Any]]) -> Table:
    """A table whose columns are what its first rows have."""
    first = list(itertools.islice(rows, _PEEKED))
    kinds: dict[str, str] = {}
    for row in first:
        for name, value in row.items():
            if kinds.get(name, NULL) == NULL:
                kinds[name] = _kind_of(value)
    return Table(kinds, lambda columns: itertools.chain(first, rows))


def kinds_of_schema(schema: Any) -> dict[str, str]:
    """Column -> kind, of a pyarrow schema."""
    import pyarrow

    lists = (pyarrow.types.is_list, pyarrow.types.is_large_list)

    def kind(found: Any) -> str:
        if pyarrow.types.is_dictionary(found):
            found = found.value_type
        if str(found) in ("string", "large_string", "string_view"):
            return TEXT
        if any(is_list(found) for is_list in lists) and pyarrow.types.is_struct(found.value_type):
            fields = {found.value_type.field(number).name for number in range(found.value_type.num_fields)}
            if "role" in fields or {"from", "value"} <= fields:
                return CHAT
        return str(found)

    times = Counter(schema.names)
    return {field.name: kind(field.type) if times[field.name] == 1 else "there twice" for field in schema}


def _kind_of(value: Any) -> str:
    if value is None or value == []:
        return NULL
    if isinstance(value, str):
        return TEXT
    return CHAT if looks_like_chat(value) else type(value).__name__


def _csv(path: Path, delimiter: str) -> Table:
    """With a header; every field is text, since guessed types would make 7 of "007" and nothing of "NA"."""
    csv.field_size_limit(max(csv.field_size_limit(), MOST_CHARS))
    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)

    def records() -> Iterator[list[str]]:
        try:
            yield from (record for record in reader if record)
        except csv.Error as error:
            raise KvcalError(
                f"{path}: cannot be read (line {reader.line_num}: {error}): mend its quotes, or make it JSON lines"
            ) from None

    found = records()
    header = next(found, [])
    if len(set(header)) < len(header):
        raise KvcalError(f"{path}: two columns of the same name in the first line ({', '.join(header)}): rename one")

    def rows(columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        for record in found:
            if len(record) != len(header):
                raise KvcalError(
                    f"{path}: {len(record)} fields up to line {reader.line_num}, the first line has {len(header)}: "
                    "mend it, or convert it to JSON lines"
                )
            yield dict(zip(header, record, strict=True))

    return Table(dict.fromkeys(header, TEXT), rows)


def _lines(path: Path) -> Iterator[str]:
    partial = ""
    for chunk in text_chunks(path):
        *lines, partial = (partial + chunk).split("\n")
        yield from (f"{line}\n" for line in lines)
        if len(partial) > MOST_CHARS:
            raise KvcalError(f"{path}: a line of more than {MOST_CHARS} characters: convert it to JSON lines")
    if partial:
        yield partial


def _parquet(path: Path) -> Table:
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(path)

    def rows(columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        with closing(file):
            for batch in file.iter_batches(batch_size=_ROWS, columns=list(columns), use_threads=False):
                yield from batch.to_pylist()

    return Table(kinds_of_schema(file.schema_arrow), rows)


def _arrow(path: Path) -> Table:
    """Both forms of the format: `save_to_disk` writes the stream, Feather is the file."""
    import pyarrow

    source = pyarrow.OSFile(str(path))  # not mapped: a file that is cut off while it is read would end the process
    try:
        reader = pyarrow.ipc.open_file(source)
        batches: Iterator[Any] = (reader.get_batch(number) for number in range(reader.num_record_batches))
    except pyarrow.ArrowInvalid:
        source.seek(0)
        reader = pyarrow.ipc.open_stream(source)
        batches = iter(reader)

    def rows(columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        for batch in batches:
            for start in range(0, batch.num_rows, _ROWS):
                yield from batch.select(list(columns)).slice(start, _ROWS).to_pylist()

    return Table(kinds_of_schema(reader.schema), rows)
