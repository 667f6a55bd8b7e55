"""Text into token blocks: what a calibration pass runs over."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..artifacts import KvcalError
from ..artifacts.shown import Shown
from ..artifacts.weights import update_digest
from .chats import Chat
from .defaults import NUM_TOKENS
from .documents import check_characters, each_document
from .mixing import Pieces, Text, mix
from .text_data import Document, TextData, not_blank
from .text_files import Unfinished

PIECE_CHARS = 100_000


@dataclass(frozen=True, repr=False)
class TokenBlocks(Shown):
    """Token ids of N blocks of equal length, and which of them count."""

    ids: Tensor
    """[N, seq_len] int32, right-padded."""
    counted: Tensor
    """[N, seq_len] bool: the text's own tokens; False at padding, at BOS and at separators that we inserted."""
    attended: Tensor
    """[N, seq_len] bool: False at padding only."""
    source: dict[str, Any]
    """Where the text came from, as the manifest states it."""

    def facts(self) -> dict[str, str]:
        return {
            "blocks": f"{len(self)} of {self.seq_len}",
            "counted": f"{int(self.counted.sum())} tokens",
            "of": str(self.source.get("id", "text")),
        }

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
    documents: Iterable[Document],
    tokenizer: Any,
    num_tokens: int = NUM_TOKENS,
    seq_len: int = 2048,
    source: dict[str, Any] | None = None,
    shorten: bool = False,
) -> TokenBlocks:
    """Tokenise documents, join them by EOS and cut them into blocks, each of which starts with BOS.

    BOS and EOS only as far as the tokenizer has them, and BOS only if it adds one by itself. Documents
    are consumed no further than needed. A document longer than `PIECE_CHARS` is tokenised in pieces, each cut behind
    its last line end, without one before its last space, and within a word only where it has neither.

    Args:
        documents: texts and chats. Where they are `open_data`'s and from several files, all files give equally many
            tokens, as far as they have them: documents or pieces of at most a block, in an order that its seed draws.
        num_tokens: block positions, BOS and separators included: ceil(num_tokens / seq_len) blocks,
            fewer when the text ends before; the last one is padded.
        seq_len: positions per block. Bases of rotated keys hold only at the positions that they were fitted to, so
            give at least the length of the contexts to decode after (`calibrate pca` takes `models.default_seq_len`).
        source: kept in the result, with what was read of `open_data`'s text, and under `num_tokens` the number of
            block positions without padding, which the number of blocks does not tell.
        shorten: where the text has, or `num_tokens` asks for, less than one block, make the one block that short.

    Raises:
        KvcalError: less text than one block, or no documents of text.
    """
    for name, count in (("num_tokens", num_tokens), ("seq_len", seq_len)):
        if isinstance(count, bool) or not isinstance(count, int):
            raise KvcalError(f"{name} {count!r}: give a whole number, e.g. 8192")
    if num_tokens < 1:
        raise KvcalError(f"{num_tokens} tokens asked for: give at least 1")
    if seq_len < 2:
        raise KvcalError(f"blocks of {seq_len} tokens: give --seq-len 2 or more")
    bos = bos_tokens(tokenizer)
    body_len = seq_len - len(bos)
    full, last = divmod(num_tokens, seq_len)
    wanted = full * body_len + max(0, last - len(bos))
    if wanted == 0:
        raise KvcalError(f"{num_tokens} tokens asked for, which BOS takes up: give at least {len(bos) + 1}")

    ids, from_text, read = read_tokens(documents, tokenizer, wanted, body_len)
    source = {**(source or {}), **read}
    name = source.get("id", "given")
    available = min(len(ids), wanted)
    if shorten and 2 <= available < body_len:
        seq_len, body_len = available + len(bos), available
    if len(ids) < min(wanted, body_len):
        advice = f" or --seq-len {len(ids)}" if len(ids) >= 2 else ""
        raise KvcalError(
            f"data {name} has only {len(ids)} tokens, fewer than one block of {seq_len}: give more text{advice}"
        )
    del ids[wanted:], from_text[wanted:]
    positions = num_tokens
    if len(ids) < wanted:
        full, last = divmod(len(ids), body_len)
        positions = full * seq_len + (last + len(bos) if last else 0)

    count = -(-positions // seq_len)
    attended = (torch.arange(count * seq_len) < positions).view(count, seq_len)
    body = attended.clone()
    body[:, : len(bos)] = False
    blocks = torch.full((count, seq_len), _pad(tokenizer), dtype=torch.int32)
    blocks[:, : len(bos)] = torch.tensor(bos, dtype=torch.int32)
    blocks[body] = torch.tensor(ids, dtype=torch.int32)
    counted = torch.zeros_like(attended)
    counted[body] = torch.tensor(from_text, dtype=torch.bool)
    return TokenBlocks(blocks, counted, attended, {**source, "num_tokens": positions})


def read_tokens(
    documents: Iterable[Document], tokenizer: Any, wanted: int, longest: int, texts: list[str] | None = None
) -> tuple[list[int], list[bool], dict[str, Any]]:
    """At least `wanted` tokens, or all that there are.

    Args:
        longest: tokens of a passage at most, where several files are mixed.
        texts: a list to which the texts that were read are added.

    Returns:
        ids; whether they are the text's own, and not separators; the provenance of `open_data`'s text, {} of others.
    """
    if isinstance(documents, TextData) and len(documents.parts) > 1:
        opened = [
            Text(partial(_part_pieces, part.documents, tokenizer, longest), number, part.wave)
            for number, source in enumerate(documents.sources)
            for part in source.parts
        ]
        separator = _separator(tokenizer)
        # A passage and its separator fill a block.
        mixed = mix(opened, wanted, max(1, longest - len(separator)), separator, documents.seed)
        if texts is not None:
            texts.append(tokenizer.decode(mixed.ids))
        return mixed.ids, mixed.from_text, documents.state(mixed.counts)
    ids: list[int] = []
    from_text: list[bool] = []
    count = 0
    for piece, is_text, begins in token_pieces(documents, tokenizer, texts):
        ids += piece
        from_text += [is_text] * len(piece)
        count += begins
        if len(ids) >= wanted:
            break
    state = documents.state([(count, sum(from_text[:wanted]))]) if isinstance(documents, TextData) else {}
    return ids, from_text, state


def _part_pieces(documents: Any, tokenizer: Any, longest: int) -> Pieces:
    # Short pieces, since little is wanted of each of thousands of long files.
    found = token_pieces(not_blank(documents()), tokenizer, most_chars=min(PIECE_CHARS, 8 * longest))
    return ((ids, begins) for ids, is_text, begins in found if is_text)


def token_pieces(
    documents: Iterable[Document], tokenizer: Any, texts: list[str] | None = None, most_chars: int | None = None
) -> Iterator[tuple[list[int], bool, bool]]:
    """(token ids, whether they are the text's own, whether a document begins with them).

    A separator stands between two documents, unless the first one ends with it, as many chats do.
    """
    separator, strip = _separator(tokenizer), tokenizer.bos_token if bos_tokens(tokenizer) else ""
    last: list[int] = []
    carried, begins = "", True
    for document in each_document(documents, (str, Chat)):
        if isinstance(document, Chat):
            # The template writes BOS, too; here it stands at the beginning of blocks.
            document = document.text(tokenizer).removeprefix(strip)
        pieces = _pieces(carried + document, most_chars or PIECE_CHARS)
        carried = pieces.pop() if isinstance(document, Unfinished) and pieces else ""
        for text in pieces:
            check_characters(text)
            # verbose=False: no warning that a document is longer than the model's context
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if not ids:
                continue
            if texts is not None:
                texts.append(text)
            if begins and last and separator and last != separator:
                yield separator, False, False
            yield ids, True, begins
            last, begins = ids[-1:], False
        begins = begins or not isinstance(document, Unfinished)


def _separator(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _pieces(text: str, most_chars: int) -> list[str]:
    found, start = [], 0
    while start < len(text):
        end = start + most_chars
        if end < len(text):
            # A space belongs to the word behind it, in most tokenizers.
            end = text.rfind("\n", start, end) + 1 or max(text.rfind(" ", start + 1, end), 0) or end
        found.append(text[start:end])
        start = end
    return found


def bos_tokens(tokenizer: Any) -> list[int]:
    """[BOS] if the tokenizer puts it in front of a text by itself, since the model then expects it."""
    if not callable(tokenizer):
        raise KvcalError(f"tokenizer: a {type(tokenizer).__name__}: give a loaded one, e.g. load_model(name).tokenizer")
    found = tokenizer("x")["input_ids"]
    plain = tokenizer("x", add_special_tokens=False)["input_ids"]
    starts = found[:1] == [tokenizer.bos_token_id] and plain[:1] != found[:1]
    return found[:1] if starts else []


def _pad(tokenizer: Any) -> int:
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in candidates if token is not None), 0)
