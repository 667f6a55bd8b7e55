"""Plain files, read in pieces."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from kvcal.artifacts import KvcalError
from kvcal.calibrate import blocks as blocks_module
from kvcal.calibrate import raw_text
from kvcal.calibrate.blocks import make_blocks, token_pieces
from kvcal.calibrate.data import open_data
from kvcal.calibrate.text_files import Unfinished, read

MEGABYTES = 60


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_borders_of_chunks_are_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(raw_text, "_CHUNK", chunk)
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffgrün\r\n🌊\r\rein Ende\r".encode())
    pieces = list(read(path))
    assert "".join(map(str, pieces)) == "grün\n🌊\n\nein Ende\n"
    assert [isinstance(piece, Unfinished) for piece in pieces] == [True] * (len(pieces) - 1) + [False]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a" * 10 + b"\xff", "invalid start byte at byte 10"),
        (b"\xef\xbb\xbfabcde\xc3", "unexpected end of data at byte 8"),
        (b"\xef\xbb\xbf\xc3(", "invalid continuation byte at byte 3"),
        ("grün".encode("utf-16"), "invalid start byte at byte 0"),
        (b"a" * 10 + b"\0", "binary data, not text"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_what_is_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, content: bytes, message: str
) -> None:
    monkeypatch.setattr(raw_text, "_CHUNK", chunk)
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(KvcalError, match=message):
        list(read(tmp_path / "a.txt"))


@pytest.mark.parametrize("line", [b"a line of text\n", b"one enormous line "], ids=["lines", "one-line"])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, tiny_tokenizer: Any, name: str, line: bytes) -> None:
    path = tmp_path / name
    data = line * (MEGABYTES * 2**20 // len(line))
    path.write_bytes(gzip.compress(data, 1) if name.endswith("gz") else data)
    tracemalloc.start()
    blocks = make_blocks(open_data(path), tiny_tokenizer, num_tokens=4096, seq_len=2048)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    expected = tiny_tokenizer(data[:4094].decode(), add_special_tokens=False, verbose=False)["input_ids"]
    assert blocks.ids[:, 1:].flatten().tolist() == expected
    assert peak < 25 * 2**20, "and most of that is the tokenizer's, for a piece"


@pytest.mark.parametrize("chunk", [1, 13, 64, 1000])
@pytest.mark.parametrize("text", ["ab cd\n" * 30, "ab cd " * 40, "abcd" * 50, "\n" * 100 + "x" * 30], ids=range(4))
def test_a_document_in_chunks_has_the_tokens_of_the_whole(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, text: str, chunk: int
) -> None:
    monkeypatch.setattr(blocks_module, "PIECE_CHARS", 50)
    chunks: list[str] = [Unfinished(text[start : start + chunk]) for start in range(0, len(text), chunk)]
    chunks[-1] = str(chunks[-1])
    found = list(token_pieces([*chunks, "next"], tiny_tokenizer))
    assert found == list(token_pieces([text, "next"], tiny_tokenizer))
    assert sum(begins for _, _, begins in found) == 2


def test_pieces_end_at_lines_then_before_spaces() -> None:
    assert blocks_module._pieces("one two\nthree four five sixsevensevens", 10) == [
        "one two\n", "three", " four", " five", " sixsevens", "evens",
    ]  # fmt: skip
