"""What is evaluated: windows of unseen text, and questions about facts far back in such text. Token ids, torch only.

Each row is a prefix, which the model reads in one dense pass, and a continuation, which is decoded token by
token through the compressed cache. A question belongs to the continuation: in the prefix it would be answered
by dense attention, and every method would look alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...artifacts import KvcalError
from ...artifacts.weights import update_digest
from ..blocks import bos_tokens, read_tokens
from ..builtin.recall import dictionary
from ..text_data import Document
from .tasks.recall import make_recall_task
from .tasks.sample import Task

FACTS = {"passkey": 1, "multikey": 8}
"""Recall tasks: how many facts stand in the prefix, one of which is asked."""
TASKS = ("perplexity", *FACTS)
_FILLER_TOKENS = 65536
"""Text to cut fillers from, where there is as much; episodes then hardly overlap."""


@dataclass(frozen=True)
class Windows:
    """Consecutive pieces of text."""

    ids: Tensor
    """[N, prefix + continuation] int64, each row with BOS if the tokenizer adds one."""
    prefix: int

    @property
    def prefixes(self) -> Tensor:
        return self.ids[:, : self.prefix]

    @property
    def continuations(self) -> Tensor:
        return self.ids[:, self.prefix :]


@dataclass(frozen=True)
class Prompts:
    windows: Windows | None
    tasks: tuple[Task, ...]
    source: dict[str, Any] = field(default_factory=dict)
    """What was read, of text that `open_data` opened."""

    @property
    def tokens_sha256(self) -> str:
        """Over all tokens that are prefilled or decoded, and the answers: equal when two runs evaluate the same."""
        digest = hashlib.sha256()
        if self.windows:
            for ids in (self.windows.prefixes, self.windows.continuations):
                digest.update(f"{list(ids.shape)}\n".encode())
                update_digest(digest, ids.to(torch.int64))
        for task in self.tasks:
            task.update(digest)
        return digest.hexdigest()


def make_prompts(
    documents: Iterable[Document],
    tokenizer: Any,
    *,
    prefix: int = 1024,
    continuation: int = 256,
    windows: int = 8,
    tasks: Sequence[str] = TASKS,
    lengths: Sequence[int] | None = None,
    episodes: int = 20,
    seed: int = 0,
    name: str = "given",
) -> Prompts:
    """Cut windows from the beginning of a text, and scatter facts in random pieces of it.

    Args:
        tasks: of `TASKS`.
        lengths: prefix lengths of the recall tasks; default: `prefix`.
        episodes: per recall task and length.
        name: of the data, for messages.

    Raises:
        KvcalError: too little text or too few words for what was asked, or a prefix too short for its facts.
    """
    unknown = next((task for task in tasks if task not in TASKS), None)
    if unknown is not None or not tasks:
        raise KvcalError(f"no task {unknown!r}: choose among {', '.join(TASKS)}")
    lengths = tuple(dict.fromkeys(lengths or (prefix,)))
    recall = [task for task in FACTS if task in tasks]
    bos = bos_tokens(tokenizer)
    width = prefix + continuation
    if prefix <= len(bos) or continuation < 2 or min(lengths) <= len(bos):
        raise KvcalError(f"a prefix of {min(prefix, *lengths)} and a continuation of {continuation} tokens: give more")
    need_windows = windows * (width - len(bos)) if "perplexity" in tasks else 0
    need_filler = max(_FILLER_TOKENS, 16 * max(lengths)) if recall else 0
    texts: list[str] = []
    stream, _, source = read_tokens(documents, tokenizer, max(need_windows, need_filler), width - len(bos), texts)

    cut = None
    if need_windows:
        there = len(stream) // (width - len(bos))
        if there < windows:
            advice = f"give --windows {there}, shorter ones or more text" if there else "give more text or shorter ones"
            raise KvcalError(f"data {name} has only {there} windows of {width} tokens ({windows} asked for): {advice}")
        body = torch.tensor(stream[:need_windows], dtype=torch.int64).view(windows, -1)
        cut = Windows(torch.cat((torch.tensor(bos, dtype=torch.int64).expand(windows, -1), body), 1), prefix)
    if not recall:
        return Prompts(cut, (), source)
    words = dictionary(texts)[1]
    most = max(FACTS[task] for task in recall)
    if len(words) < most:
        raise KvcalError(f"data {name} has only {len(words)} words to hide facts under, {most} needed: give more text")
    if len(stream) < max(lengths):
        raise KvcalError(
            f"data {name} has only {len(stream)} tokens, fewer than a prefix of {max(lengths)}: give more text"
        )

    built = [
        make_recall_task(task, FACTS[task], tokenizer, bos, stream, words, length, episodes, seed)
        for task in recall
        for length in lengths
    ]
    return Prompts(cut, tuple(built), source)
