"""What is evaluated: windows of unseen text, and samples of a context, a question about it and answers.

A window is a prefix, which the model reads in one dense pass, and a continuation, which is decoded token by token
through the compressed cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...artifacts import KvcalError
from ...artifacts.weights import update_digest
from ..blocks import bos_tokens, read_tokens
from ..builtin.recall import dictionary
from ..text_data import Document
from .tasks.names import FACTS, ON_TEXT, RULER, parse_tasks
from .tasks.prompts_file import make_prompt_tasks
from .tasks.recall import make_recall_task
from .tasks.ruler import make_ruler_tasks
from .tasks.sample import Task, check_fit

_FILLER_TOKENS = 65536
"""Tokens of text to cut fillers from, where there are as many: episodes then hardly overlap."""


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
    """What was read of text that `open_data` opened; `ruler`: by what its tasks were made; `prompts`: files read."""

    @property
    def longest_context(self) -> int:
        """Tokens of the longest prefix or context; few are decoded after them."""
        contexts = [len(sample.context) for task in self.tasks for sample in task.samples]
        return max(contexts + ([self.windows.prefix] if self.windows else []), default=0)

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
    tasks: Sequence[str] = ON_TEXT,
    lengths: Sequence[int] | None = None,
    episodes: int = 20,
    seed: int = 0,
    name: str = "given",
    prompt_files: Sequence[Path] = (),
    match: str = "exact",
    max_new_tokens: int | None = None,
    chat_template: bool = True,
    most_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Prompts:
    """Cut windows from the beginning of a text, scatter facts in random pieces of it, and make the other tasks.

    Args:
        documents: () will do where no task is made of text: then none is read.
        tasks: see `parse_tasks`; [] where there are `prompt_files`.
        lengths: of the recall tasks' contexts, and of RULER's context, question and answer together; default: `prefix`.
        episodes: per task and length.
        name: of the data, for messages.
        prompt_files: questions of one's own, see `make_prompt_tasks`.
        match: how their answers are scored.
        max_new_tokens: of their answers.
        chat_template: RULER's tasks and the user's prompts are put into the model's chat template, if it has one.
        most_tokens: the model's context.
        progress: called with (samples made, all), of RULER's tasks.

    Raises:
        KvcalError: too little text or too few words for what was asked, a length too short for its task, or RULER's
            package or a prompt file that is not as it must be.
    """
    names = parse_tasks(tasks) if tasks or not prompt_files else []
    ruler, on_text = ([name for name in names if name in kind] for kind in (RULER, ON_TEXT))
    lengths = tuple(dict.fromkeys(lengths or (prefix,)))
    if most_tokens is not None:
        _check_context(names, prefix, continuation, max(lengths), most_tokens)
    asked, files = make_prompt_tasks(prompt_files, tokenizer, match, max_new_tokens, chat_template)
    for task in asked:
        check_fit(task, most_tokens)
    cut: Windows | None = None
    made: list[Task] = []
    source: dict[str, Any] = {}
    if on_text:
        cut, made, source = _of_text(
            documents, tokenizer, prefix, continuation, windows, on_text, lengths, episodes, seed, name
        )
    if ruler:
        more, source["ruler"] = make_ruler_tasks(ruler, tokenizer, lengths, episodes, seed, chat_template, progress)
        made += more
    if files:
        source["prompts"] = files
    return Prompts(cut, (*made, *asked), source)


def _check_context(names: Sequence[str], prefix: int, continuation: int, longest: int, most_tokens: int) -> None:
    """Raise KvcalError for what the model cannot hold: said before the text is found to be too short for it."""
    for name in names:
        if name == "perplexity" and prefix + continuation > most_tokens:
            raise KvcalError(
                f"{name}: {prefix} + {continuation} tokens exceed this model's context of {most_tokens}: give a "
                "smaller --prefix or --continuation"
            )
        if name != "perplexity" and longest > most_tokens:
            raise KvcalError(
                f"{name}@{longest}: this model's context is {most_tokens} tokens: give shorter --lengths, or a smaller "
                "--prefix"
            )


def _of_text(
    documents: Iterable[Document],
    tokenizer: Any,
    prefix: int,
    continuation: int,
    windows: int,
    tasks: Sequence[str],
    lengths: Sequence[int],
    episodes: int,
    seed: int,
    name: str,
) -> tuple[Windows | None, list[Task], dict[str, Any]]:
    """Windows, recall tasks and what was read."""
    recall = [task for task in FACTS if task in tasks]
    bos = bos_tokens(tokenizer)
    width = prefix + continuation
    if prefix <= len(bos) or continuation < 2 or min(lengths) <= len(bos):
        raise KvcalError(
            f"a prefix of {min(prefix, *lengths)} and a continuation of {continuation} tokens are too few: give at "
            f"least {len(bos) + 1} (--prefix, --lengths) and 2 (--continuation)"
        )
    need_windows = windows * (width - len(bos)) if "perplexity" in tasks else 0
    need_filler = max(_FILLER_TOKENS, 16 * max(lengths)) if recall else 0
    texts: list[str] = []
    stream, _, source = read_tokens(documents, tokenizer, max(need_windows, need_filler), width - len(bos), texts)

    cut = None
    if need_windows:
        count = len(stream) // (width - len(bos))
        if count < windows:
            advice = f"give --windows {count}, shorter ones or more text" if count else "give more text or shorter ones"
            raise KvcalError(f"data {name} has only {count} windows of {width} tokens ({windows} asked for): {advice}")
        body = torch.tensor(stream[:need_windows], dtype=torch.int64).view(windows, -1)
        cut = Windows(torch.cat((torch.tensor(bos, dtype=torch.int64).expand(windows, -1), body), 1), prefix)
    if not recall:
        return cut, [], source
    words = dictionary(texts)[1]
    need = max(FACTS[task] for task in recall)
    if len(words) < need:
        raise KvcalError(f"data {name} has only {len(words)} words to hide facts under, {need} needed: give more text")
    if len(stream) < max(lengths):
        raise KvcalError(
            f"data {name} has only {len(stream)} tokens, fewer than a prefix of {max(lengths)}: give more text"
        )

    built = [
        make_recall_task(task, FACTS[task], tokenizer, bos, stream, words, length, episodes, seed)
        for task in recall
        for length in lengths
    ]
    return cut, built, source
