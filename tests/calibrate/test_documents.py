"""What is no list of texts is said to be none, by everything that takes one."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest

from kvcal.artifacts import KvcalError
from kvcal.calibrate import calibrate, make_blocks
from kvcal.calibrate.evaluation.prompts import make_prompts


class Frame:
    """As pandas' and polars': iterating over it gives the names of its columns."""

    columns = ("text",)

    def __iter__(self) -> Any:
        return iter(self.columns)


NO_DOCUMENTS: dict[str, tuple[Any, str]] = {
    "text": ("a string" * 99, r"documents: a str ('a stringa"),
    "empty text": ("", "documents: a str ('')"),
    "bytes": (b"bytes" * 99, r"documents: a bytes (b'bytesb"),
    "path": (Path("a.txt"), "give open_data(path)"),
    "open file": (io.StringIO("line\n" * 99), "its lines would be the documents"),
    "none": (None, "documents: a NoneType: give a list of texts"),
    "number": (7, "documents: a int (7): give a list of texts"),
    "mapping": ({"text": ["x" * 999]}, "documents: a dict: its keys would be the documents"),
    "frame": (Frame(), "documents: a Frame: its keys would be the documents"),
    "numbers": ([1, 2], "document 0: a int (1): give text"),
    "none among them": (["x" * 20, None], "document 1: a NoneType: give text"),
    "bytes among them": (["x" * 20, b"y" * 99], "document 1: a bytes (b'yyy"),
    "rows": ([{"text": "x" * 999}], "document 0: a dict: give text"),
    "half a character": (["x" * 20, "ab\ud83dcd"], "half a character (U+D83D in 'ab\\ud83dcd')"),
}


@pytest.mark.parametrize("name", NO_DOCUMENTS)
def test_what_are_no_documents(tiny_tokenizer: Any, name: str) -> None:
    documents, said = NO_DOCUMENTS[name]
    for reads in (
        lambda: make_blocks(documents, tiny_tokenizer, num_tokens=64, seq_len=16),
        lambda: make_prompts(documents, tiny_tokenizer, prefix=16, continuation=8, windows=2, tasks=["perplexity"]),
    ):
        with pytest.raises(KvcalError, match=re.escape(said)) as caught:
            reads()
        assert str(caught.value).isprintable()
        if isinstance(documents, io.StringIO):
            documents.seek(0)


def test_whole_characters_beyond_the_basic_plane_are_text(tiny_tokenizer: Any) -> None:
    assert make_blocks(("\U0001f600" * 9 for _ in range(2)), tiny_tokenizer, num_tokens=16, seq_len=16).counted.any()


def test_a_generators_own_exception_is_its_callers(tiny_tokenizer: Any) -> None:
    def documents() -> Any:
        yield "x" * 9
        raise ZeroDivisionError("theirs")

    with pytest.raises(ZeroDivisionError, match="theirs"):
        make_blocks(documents(), tiny_tokenizer)


@pytest.mark.parametrize("tokenizer", ["gpt2", None])
def test_a_name_is_no_tokenizer(tokenizer: Any) -> None:
    with pytest.raises(KvcalError, match=r"tokenizer: a \w+: give a loaded one"):
        make_blocks(["text"], tokenizer)


def test_what_is_neither_blocks_nor_a_name_is_no_data() -> None:
    for given in (None, 3, {"text": "a"}):
        with pytest.raises(KvcalError, match=r"data: a \w+: name text, or give what make_blocks"):
            calibrate(None, given)  # type: ignore[arg-type]
