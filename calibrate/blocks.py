"""Text into token blocks: what a calibration pass runs over."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..artifacts import KvcalError
from ..artifacts.weights import update_digest
from .documents import check_characters, each_document

PIECE_CHARS = 100_000


@dataclass(frozen=True)
class TokenBlocks:
    """Token ids of N blocks of equal length, and which of them count."""

    ids: Tensor
    """[N, seq_len] int32, right-padded."""
    counted: Tensor
    """[N, seq_len] bool: the text's own tokens; False at padding, at BOS and at separators that we inserted."""
    attended: Tensor
    """[N, seq_len] bool: False at padding only."""
    source: dict[str, Any]
    """Where the text came from, as the manifest states it."""

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def seq_len(self) -> int:
        return self.ids.shape[1]

    @property
    def content_hash(self) -> str:
        """sha256 over the shape ("N seq_len" and a newline), then the bytes of ids, counted and attended."""
        digest = hashlib.sha256(f"{len(self)} {self.seq_len}\n".encode())
        for tensor in (self.ids, self.counted, self.attended):
            update_digest(digest, tensor)
        return digest.hexdigest()


def make_blocks(
    documents: Iterable[str],
    tokenizer: Any,
    num_tokens: int = 131072,
    seq_len: int = 2048,
    source: dict[str, Any] | None = None,
) -> TokenBlocks:
    """Tokenise documents, join them by EOS and cut them into blocks, each of which starts with BOS.

    BOS and EOS only as far as the tokenizer has them, and BOS only if it adds one by itself. Documents
    are consumed no further than needed; one that is longer than `PIECE_CHARS` is tokenised in pieces,
    cut at line ends where there are any.

    Args:
        num_tokens: block positions, BOS and separators included: ceil(num_tokens / seq_len) blocks,
            fewer when the text ends before; the last one is padded.
        seq_len: positions per block.
        source: kept in the result, with the number of block positions under `num_tokens`: the last block may be
            padded, so their number does not tell it.

    Raises:
        KvcalError: less text than one block, or no documents of text.
    """
    if num_tokens < 1:
        raise KvcalError(f"{num_tokens} tokens asked for: give at least 1")
    if seq_len < 2:
        raise KvcalError(f"blocks of {seq_len} tokens: give --seq-len 2 or more")
    bos = bos_tokens(tokenizer)
    body_len = seq_len - len(bos)
    full, rest = divmod(num_tokens, seq_len)
    wanted = full * body_len + max(0, rest - len(bos))
    if wanted == 0:
        raise KvcalError(f"{num_tokens} tokens asked for, which BOS takes up: give at least {len(bos) + 1}")

    ids: list[int] = []
    own: list[bool] = []
    for piece, is_text in token_pieces(documents, tokenizer):
        ids += piece
        own += [is_text] * len(piece)
        if len(ids) >= wanted:
            break
    name = (source or {}).get("id", "given")
    if len(ids) < min(wanted, body_len):
        other = f" or --seq-len {len(ids)}" if len(ids) >= 2 else ""
        raise KvcalError(
            f"data {name} has only {len(ids)} tokens, fewer than one block of {seq_len}: give more text{other}"
        )
    del ids[wanted:], own[wanted:]
    positions = num_tokens
    if len(ids) < wanted:
        full, rest = divmod(len(ids), body_len)
        positions = full * seq_len + (rest + len(bos) if rest else 0)

    count = -(-positions // seq_len)
    attended = (torch.arange(count * seq_len) < positions).view(count, seq_len)
    body = attended.clone()
    body[:, : len(bos)] = False
    blocks = torch.full((count, seq_len), _pad(tokenizer), dtype=torch.int32)
    blocks[:, : len(bos)] = torch.tensor(bos, dtype=torch.int32)
    blocks[body] = torch.tensor(ids, dtype=torch.int32)
    counted = torch.zeros_like(attended)
    counted[body] = torch.tensor(own, dtype=torch.bool)
    return TokenBlocks(blocks, counted, attended, {**(source or {}), "num_tokens": positions})


def token_pieces(documents: Iterable[str], tokenizer: Any) -> Iterator[tuple[list[int], bool]]:
    """(token ids, whether they are the text's own), a separator before every document but the first."""
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    started = False
    for document in each_document(documents):
        continued = False
        for text in _pieces(document):
            check_characters(text)
            # verbose=False: no warning that a document is longer than the model's context
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if not ids:
                continue
            if started and not continued and separator:
                yield separator, False
            started = continued = True
            yield ids, True


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = start + PIECE_CHARS
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def bos_tokens(tokenizer: Any) -> list[int]:
    """[BOS] if the tokenizer puts it in front of a text by itself, since the model then expects it."""
    if not callable(tokenizer):
        raise KvcalError(f"tokenizer: a {type(tokenizer).__name__}: give a loaded one, e.g. load_model(name).tokenizer")
    found = tokenizer("x")["input_ids"]
    plain = tokenizer("x", add_special_tokens=False)["input_ids"]
    starts = found[:1] == [tokenizer.bos_token_id] and plain[:1] != found[:1]
    return found[:1] if starts else []


def _pad(tokenizer: Any) -> int:
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in known if token is not None), 0)
