"""Rows of tables on the disk, and which of their columns is the text."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from kvcal.artifacts import KvcalError
from kvcal.calibrate import raw_text
from kvcal.calibrate.chats import Chat
from kvcal.calibrate.text_files import read

CHAT = [{"role": "user", "content": "hi"}]


def _rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _error(path: Path, text_column: str | None = None) -> str:
    with pytest.raises(KvcalError) as caught:
        list(read(path, text_column))
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"id": "q1", "text": "t", "content": "c"}, "t"),
        ({"id": "q1", "content": "c", "title": "x"}, "c"),
        ({"article": "a"}, "a"),
        ({"text": None, "n": 1}, ""),
    ],
    ids=str,
)
def test_the_only_choice(tmp_path: Path, row: Any, expected: str) -> None:
    first = {name: "t" if value is None else value for name, value in row.items()}
    assert next(read(_rows(tmp_path / "a.jsonl", row, first))) == expected


@pytest.mark.parametrize(
    "row",
    [
        {"id": "q1", "conversation_of": [["human", "How do tides work?"]]},
        {"id": "q1", "n": 1},
        {"id": "q1"},
        {"url": "https://x"},
        {"hash": "ab", "lang": "en"},
        {"id": 1, "body": "b"},
        {"prompt": "p", "completion": "c"},
        {"text": 3, "title": "x"},
        {"text": ["a", "b"], "id": "x"},
        {"content": [{"type": "text", "text": "a"}], "id": "x"},
        {"content": "c", "role": "user"},
        {"text": "t", "messages": CHAT},
        {"messages": CHAT, "conversations": CHAT},
        {"data": {"text": "t"}},
        {"Once upon a time": "there"},
    ],
    ids=str,
)
@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_what_may_be_the_text_is_asked(tmp_path: Path, row: dict[str, Any], ending: str) -> None:
    import pyarrow
    import pyarrow.parquet

    path = _rows(tmp_path / "a.jsonl", row)
    if ending == ".parquet":
        path = tmp_path / "a.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    message = _error(path)
    assert message.startswith(f"{path}: columns ") and all(f"{name} (" in message for name in row)
    assert message.endswith("give --text-column NAME" if "data" not in row else "of text or of messages")


@pytest.mark.parametrize(
    ("row", "asked", "expected"),
    [
        ({"id": "a", "body": "b"}, "body", "b"),
        ({"id": "a"}, "id", "a"),
        ({"prompt": "Q:", "completion": "A"}, "prompt+completion", "Q:\nA"),
        ({"prompt": "Q: ", "completion": "A"}, "prompt+completion", "Q: A"),
        ({"prompt": "Q", "completion": None}, "prompt+completion", "Q"),
        ({"a+b": "c", "a": "x", "b": "y"}, "a+b", "c"),
    ],
)
def test_the_column_that_was_asked_for(tmp_path: Path, row: Any, asked: str, expected: str) -> None:
    assert list(read(_rows(tmp_path / "a.jsonl", row), asked)) == [expected]


@pytest.mark.parametrize(
    ("row", "asked", "message"),
    [
        ({"body": "b", "n": 1}, "text", "no column 'text' among body (string), n (int)"),
        ({"body": "b", "n": 1}, "n", "column 'n' holds int, neither text nor messages"),
        ({"body": "b", "n": 1}, "", "no column ''"),
        ({"prompt": "p", "completion": CHAT}, "prompt+completion", "holds list and str, not text"),
    ],
)
def test_a_column_that_is_no_text(tmp_path: Path, row: Any, asked: str, message: str) -> None:
    assert message in _error(_rows(tmp_path / "a.jsonl", row), asked)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.arrow"])
@pytest.mark.parametrize("column", ["messages", "conversations", "turns"])
def test_chats_in_every_kind_of_table(tmp_path: Path, name: str, column: str) -> None:
    import pyarrow
    import pyarrow.feather
    import pyarrow.parquet

    rows = [{"id": "x", column: CHAT}, {"id": "y", column: [*CHAT, {"role": "assistant", "content": "ho"}]}]
    path = tmp_path / name
    if name == "a.json":
        path.write_text(json.dumps(rows))
    elif name == "a.jsonl":
        _rows(path, *rows)
    elif name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        pyarrow.feather.write_feather(pyarrow.Table.from_pylist(rows), str(path))
    found = list(read(path, "turns" if column == "turns" else None))
    assert [chat.messages if isinstance(chat, Chat) else chat for chat in found] == [row[column] for row in rows]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}', ["a", "b"]),
        (b'{"text": "a"} {"text": "b"}\n[{"role": "user", "content": "c"}]', "both messages and text can be the text"),
        (b'{"text": "a"}\n{"text": oops}\n' + b'{"text": "a"}\n' * 99, "row 2: is not valid JSON (Expecting value"),
        (b'{"text": "a"}\n{"text": "b', "row 2: is not valid JSON (Unterminated"),
        (b'{"text": "a"}\n{"text": {"a": 1}}\n', "row 2: column 'text' holds dict"),
        (b'{"text": "a"}\n{"t": "b"}\n', "row 2: has no column 'text'"),
        (b'{"text": "\\ud83d"}', "row 1 with half a character"),
        (b"7\n", "row 1: is a int"),
        (
            b'[{"text": "a"}]',
            "row 1: is a list: expected an object, a text or a list of messages, or name the file .json",
        ),
        (b"[" * 99999, "row 1: is not valid JSON (too many levels)"),
    ],
)
def test_json_lines(tmp_path: Path, content: bytes, expected: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    assert expected in _error(path) if isinstance(expected, str) else list(read(path)) == expected


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_json_over_the_borders_of_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(raw_text, "_CHUNK", chunk)
    texts = ["grün 🌊", 'a "quoted" \\ one', "", "x" * 50]
    (tmp_path / "a.json").write_text(
        json.dumps([{"text": text, "n": [1.5e3]} for text in texts], ensure_ascii=False, indent=20)
    )
    assert list(read(tmp_path / "a.json")) == texts
    assert list(read(_rows(tmp_path / "a.jsonl", *texts))) == texts


def test_a_long_list_is_not_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": "x" * 1000}] * 8000))
    tracemalloc.start()
    assert sum(len(text) for text in read(tmp_path / "a.json")) == 8_000_000  # type: ignore[arg-type]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", 'id,text\n1,"hello, ""you""\nand me"\n\n2,NA\n3,007\n', ['hello, "you"\nand me', "NA", "007"]),
        ("a.tsv", 'text\tn\nfoo "bar" baz\t1\n', ['foo "bar" baz']),
        ("a.csv", "body\n" + "x" * 200_000, ["x" * 200_000]),
        ("a.csv", "id,text\n", []),
        ("a.csv", "Once upon a time\nthere was\n", "columns Once upon a time (string)"),
        ("a.csv", "id;text\n1;x\n", "columns id;text (string)"),
        ("a.csv", "id,text\n1,x,y\n", "3 fields up to line 2, the first line has 2"),
        ("a.csv", "text,text\n1,x\n", "two columns of the same name"),
        ("a.tsv", 'id\ttext\n1\t"Hello there\n2\tx\n', "unexpected end of data): mend its quotes"),
    ],
)
def test_tables_of_text(tmp_path: Path, name: str, content: str, expected: Any) -> None:
    (tmp_path / name).write_text(content)
    path = tmp_path / name
    assert expected in _error(path) if isinstance(expected, str) else list(read(path)) == expected


def _zstd(data: bytes) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("ending", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", _zstd)]
)
def test_compressed_files(tmp_path: Path, ending: str, compress: Any) -> None:
    for name, content, expected in (
        ("a.txt", b"one\r\ntwo", ["one\ntwo"]),
        ("b.jsonl", b'{"text": "one"}\n', ["one"]),
        ("c.csv", b"text\none\n", ["one"]),
    ):
        path = tmp_path / f"{name}{ending}"
        path.write_bytes(compress(content))
        assert list(read(path)) == expected
    path.write_bytes(compress(b"text\none\n") + compress(b"two\n"))
    assert list(read(path)) == ["one", "two"], "as several of them put together are read by their own tools"
    path.write_bytes(compress(b"text\none\n" * 1000)[:-5])
    assert f"c.csv{ending}: cannot be read" in _error(path)
    path.write_bytes(b"none of that")
    assert f"c.csv{ending}: cannot be read" in _error(path)
