from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kvcal.artifacts import KvcalError
from kvcal.calibrate import blocks as blocks_module
from kvcal.calibrate.blocks import TokenBlocks, make_blocks

BOS, EOS = 256, 257


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Byte by byte, so independently of how texts are cut and joined."""
    return [tokenizer.convert_tokens_to_ids(token) for character in text for token in tokenizer.tokenize(character)]


@pytest.fixture
def without_bos(tiny_tokenizer: Any) -> Any:
    """It has a BOS token but does not add it by itself, as Qwen's does not."""
    import copy

    from tokenizers import processors

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    return tokenizer


def test_layout_by_hand(tiny_tokenizer: Any) -> None:
    a, b, c = (_encode(tiny_tokenizer, letter)[0] for letter in "abc")
    found = make_blocks(["aab", "cc", "abc"], tiny_tokenizer, num_tokens=10, seq_len=4)
    # a a b EOS c c EOS a b c, in blocks of BOS + 3; the last has 10 - 2 * 4 = 2 positions
    assert found.ids.tolist() == [[BOS, a, a, b], [BOS, EOS, c, c], [BOS, EOS, EOS, EOS]]
    assert found.counted.tolist() == [[False, True, True, True], [False, False, True, True], [False] * 4]
    assert found.attended.tolist() == [[True] * 4, [True] * 4, [True, True, False, False]]
    assert found.ids.dtype == torch.int32 and found.counted.dtype == found.attended.dtype == torch.bool


@pytest.mark.parametrize("bos", [True, False], ids=["bos", "no-bos"])
@pytest.mark.parametrize(("num_tokens", "seq_len"), [(64, 16), (60, 16), (65, 16), (16, 16), (9, 16), (50, 7), (6, 2)])
def test_counts_and_content(tiny_tokenizer: Any, without_bos: Any, bos: bool, num_tokens: int, seq_len: int) -> None:
    tokenizer = tiny_tokenizer if bos else without_bos
    documents = ["alpha beta", "γδ", "one\ntwo", "x" * 200]
    found = make_blocks(documents, tokenizer, num_tokens=num_tokens, seq_len=seq_len)
    assert len(found) == -(-num_tokens // seq_len) and found.seq_len == seq_len
    assert int(found.attended.sum()) == num_tokens
    assert (found.attended.long().diff(dim=1) <= 0).all(), "padding is on the right"
    if bos:
        assert (found.ids[:, 0] == BOS).all() and not found.counted[:, 0].any()
    joined: list[int] = []
    for document in documents:
        joined += ([EOS] if joined else []) + _encode(tokenizer, document)
    inside = found.attended.clone()
    inside[:, : int(bos)] = False
    body = found.ids[inside].tolist()
    assert body == joined[: len(body)]
    assert found.counted[inside].tolist() == [token != EOS for token in body]
    assert not found.counted[~inside].any()


def test_no_separator_without_eos(without_bos: Any) -> None:
    without_bos.eos_token = None
    found = make_blocks(["ab", "cd"], without_bos, num_tokens=4, seq_len=4)
    assert found.ids[0].tolist() == _encode(without_bos, "abcd") and found.counted.all()


def test_consumes_no_more_than_needed(tiny_tokenizer: Any) -> None:
    taken = []

    def endless() -> Iterator[str]:
        while True:
            taken.append(1)
            yield "x" * 9

    make_blocks(endless(), tiny_tokenizer, num_tokens=64, seq_len=16)
    # 4 blocks have room for 60 tokens; n documents with separators are 10 n - 1 tokens
    assert len(taken) == 7


@pytest.mark.parametrize("line", [0, 7, 50], ids=["no-lines", "short-lines", "lines"])
def test_long_documents_are_cut_at_line_ends(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, line: int) -> None:
    monkeypatch.setattr(blocks_module, "PIECE_CHARS", 20)
    text = "".join("\n" if line and index % line == line - 1 else "abcdef"[index % 6] for index in range(211))
    pieces = blocks_module._pieces(text, 20)
    assert "".join(pieces) == text and max(map(len, pieces)) <= 20
    if line == 7:
        assert all(piece.endswith("\n") for piece in pieces[:-1])
    found = make_blocks([text], tiny_tokenizer, num_tokens=192, seq_len=64)
    assert found.ids[:, 1:].flatten().tolist() == _encode(tiny_tokenizer, text)[: 3 * 63]
    assert int(found.counted.sum()) == 3 * 63, "no separators inside a document"


def test_text_that_ends_early_is_used_up(tiny_tokenizer: Any) -> None:
    found = make_blocks(["x" * 40], tiny_tokenizer, num_tokens=1000, seq_len=16)
    # 15 text tokens a block: 15 + 15 + 10
    assert found.attended.sum(1).tolist() == [16, 16, 11]
    assert found.counted.sum(1).tolist() == [15, 15, 10]
    assert len(make_blocks(["x" * 30], tiny_tokenizer, num_tokens=1000, seq_len=16)) == 2, "no block of BOS alone"


def test_less_than_one_block(tiny_tokenizer: Any) -> None:
    message = "^data mine has only 812 tokens, fewer than one block of 2048: give more text or --seq-len 812$"
    with pytest.raises(KvcalError, match=message):
        make_blocks(["x" * 400, "x" * 411], tiny_tokenizer, source={"id": "mine"})
    assert len(make_blocks(["x" * 400, "x" * 411], tiny_tokenizer, seq_len=812)) >= 1, "the advice works"


@pytest.mark.parametrize("num_tokens", [2048, 131072])
def test_less_than_one_block_makes_one_where_that_is_asked_for(tiny_tokenizer: Any, num_tokens: int) -> None:
    documents = ["x" * 400, "x" * 411]  # and an EOS
    found = make_blocks(documents, tiny_tokenizer, num_tokens=num_tokens, shorten=True)
    assert found.ids.shape == (1, 813) and found.attended.all()
    assert torch.equal(found.ids, make_blocks(documents, tiny_tokenizer, num_tokens=813, seq_len=813).ids)
    with pytest.raises(KvcalError, match="only 1 tokens"):
        make_blocks(["x"], tiny_tokenizer, shorten=True)


def test_fewer_tokens_asked_for_than_one_block_make_one_where_that_is_asked_for(tiny_tokenizer: Any) -> None:
    found = make_blocks(["x" * 2699], tiny_tokenizer, num_tokens=100, seq_len=8192, shorten=True)
    assert found.ids.shape == (1, 100) and found.attended.all()


@pytest.mark.parametrize("documents", [[], [""]], ids=["none", "empty"])
def test_no_text(tiny_tokenizer: Any, documents: list[str]) -> None:
    with pytest.raises(KvcalError, match="only 0 tokens"):
        make_blocks(documents, tiny_tokenizer)


def test_empty_documents_add_no_separator(without_bos: Any) -> None:
    found = make_blocks(["", "ab", "", "", "cd", ""], without_bos, num_tokens=100, seq_len=5)
    a, b, c, d = _encode(without_bos, "abcd")
    assert found.ids.tolist() == [[a, b, EOS, c, d]]


@pytest.mark.parametrize(
    "options", [{"num_tokens": 0}, {"num_tokens": -1}, {"seq_len": 1}, {"num_tokens": 17, "seq_len": 0}], ids=str
)
def test_bad_settings(tiny_tokenizer: Any, options: dict[str, Any]) -> None:
    with pytest.raises(KvcalError, match="give"):
        make_blocks(["x" * 99], tiny_tokenizer, **options)


def test_no_warning_about_long_texts(without_bos: Any, caplog: pytest.LogCaptureFixture) -> None:
    from transformers.utils import logging

    logging.set_verbosity_warning()
    logging.get_logger("transformers").addHandler(caplog.handler)
    try:
        make_blocks(["x" * 500], without_bos, num_tokens=32, seq_len=16)
        assert caplog.text == ""
        without_bos("x" * 500)
        assert "longer than the specified maximum" in caplog.text, "there was something to silence"
    finally:
        logging.get_logger("transformers").removeHandler(caplog.handler)


def test_content_hash_is_over_shape_and_bytes() -> None:
    ids = torch.arange(6, dtype=torch.int32).view(2, 3)
    counted = torch.tensor([[False, True, True], [False, True, False]])
    attended = torch.tensor([[True, True, True], [True, True, False]])
    expected = hashlib.sha256(
        b"2 3\n" + b"".join(n.to_bytes(4, "little") for n in range(6)) + bytes([0, 1, 1, 0, 1, 0, 1, 1, 1, 1, 1, 0])
    ).hexdigest()
    blocks = TokenBlocks(ids, counted, attended, {})
    assert blocks.content_hash == expected
    assert TokenBlocks(ids.view(3, 2), counted.view(3, 2), attended.view(3, 2), {}).content_hash != expected
    assert TokenBlocks(ids, attended, counted, {}).content_hash != expected
