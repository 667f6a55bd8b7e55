"""A user's own prompts: JSON lines of context, question and answers, or chats (docs/tasks.md)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....artifacts import KvcalError
from ....artifacts.missing import check_exists
from ...blocks import bos_tokens
from ...chats import read_chat
from ...documents import check_characters
from ...json_rows import json_values
from ...raw_text import COMPRESSIONS
from ...text_files import kind
from .chat_prompts import as_chat, has_template
from .encoding import encode, text_sample
from .names import TASKS
from .sample import Sample, Task

MATCHES = ("exact", "part")
"""How predictions are scored: names in `SCORINGS`."""
_BESIDE_THE_ANSWER = 32
"""Tokens that are decoded beyond the length of the longest answer, where no other number is asked for."""


@dataclass(frozen=True)
class Prompt:
    """One row of a file, checked."""

    history: Sequence[Mapping[str, Any]]
    """Messages before the user's last one."""
    context: str
    question: str
    answers: list[str]
    label: str
    """File and row."""


def make_prompt_tasks(
    paths: Sequence[Path], tokenizer: Any, match: str = "exact", max_new_tokens: int | None = None, chat: bool = True
) -> tuple[list[Task], list[dict[str, Any]]]:
    """A task of each file, under its name without the endings; and what was read.

    Args:
        match: of `MATCHES`.
        max_new_tokens: default: those of the longest answer, and 32.
        chat: with the model's chat template, if it has one.

    Raises:
        KvcalError: a file that cannot be read, rows without what they need, two files of one name.
    """
    if match not in MATCHES:
        raise KvcalError(f"no match {match!r}: choose among {', '.join(MATCHES)}")
    read = read_all_prompts(paths)
    chat = chat and has_template(tokenizer)
    tasks, sources = [], []
    for path, (name, prompts) in zip(paths, read.items(), strict=True):
        samples = tuple(_sample(prompt, tokenizer, chat) for prompt in prompts)
        sizes = [[len(encode(tokenizer, answer)) for answer in prompt.answers] for prompt in prompts]
        new_tokens = max_new_tokens or max(map(max, sizes)) + _BESIDE_THE_ANSWER
        for prompt, lengths in zip(prompts, sizes, strict=True):
            if min(lengths) > new_tokens:
                raise KvcalError(
                    f"{prompt.label}: its answer has {min(lengths)} tokens, of which {new_tokens} would be decoded: "
                    f"give --max-new-tokens {min(lengths)} or more"
                )
        tasks.append(Task(name, None, samples, new_tokens, match))
        sources.append({"file": path.name, "sha256": _hash(prompts), "rows": len(prompts), "chat_template": chat})
    return tasks, sources


def read_all_prompts(paths: Sequence[Path]) -> dict[str, list[Prompt]]:
    """The prompts of each file by the name of its task. Raises KvcalError: see `make_prompt_tasks`."""
    found: dict[str, Path] = {}
    for path in paths:
        check_exists(path)
        name = _task_name(path)
        if name in found or name.partition("@")[0] in TASKS:  # results name ours with a length: passkey@2048
            owner = found.get(name, "a task of ours")
            raise KvcalError(f"{path}: its results would be named {name!r} as those of {owner}: rename the file")
        found[name] = path
    return {name: read_prompts(path) for name, path in found.items()}


def read_prompts(path: Path) -> list[Prompt]:
    """Raises KvcalError: see `make_prompt_tasks`."""
    if path.exists() and not path.is_file():
        raise KvcalError(f"{path}: is no plain file, and prompts are read twice: write them to a file first")
    rows = json_values(path, kind(path.name) == ".json")
    found = [_prompt(row, f"{path}: row {number}") for number, row in enumerate(rows, 1)]
    if not found:
        raise KvcalError(f"{path}: no prompts: expected a line for each, with context, question and answer")
    return found


def _task_name(path: Path) -> str:
    name = path.name
    for endings in (COMPRESSIONS, (".jsonl", ".ndjson", ".json")):
        if name.lower().endswith(endings):
            name = name[: name.rindex(".")]
    return name or path.name


def _prompt(row: Mapping[str, Any], label: str) -> Prompt:
    history: Sequence[Mapping[str, Any]] = ()
    asked = ""
    if row.get("messages") is not None:
        messages = read_chat(row["messages"], None, label).messages
        if row.get("question") is None:
            if messages[-1]["role"] != "user":
                raise KvcalError(
                    f"{label}: the last message is of {messages[-1]['role']}: expected the user's question, or "
                    "`question` beside the messages"
                )
            asked, messages = str(messages[-1]["content"]), messages[:-1]
            if not asked.strip():
                raise KvcalError(f"{label}: the last message is empty: expected the user's question")
        history = messages
    if not asked:
        asked = _text(row, "question", label)
    context = _text(row, "context", label) if row.get("context") is not None or not history else ""
    if context and not (context[-1].isspace() or asked[0].isspace()):
        asked = "\n\n" + asked
    return Prompt(history, context, asked, _answers(row, label), label)


def _text(row: Mapping[str, Any], key: str, label: str) -> str:
    value = row.get(key)
    if value is None:
        more = ", or messages before the last" if key == "context" else ""
        raise KvcalError(f"{label}: no {key}: give text under {key!r}{more}")
    return _checked(value, key, label)


def _answers(row: Mapping[str, Any], label: str) -> list[str]:
    given = [key for key in ("answer", "answers") if row.get(key) is not None]
    if len(given) != 1:
        both = "both `answer` and `answers`" if given else "no answer"
        raise KvcalError(f"{label}: {both}: give text under 'answer', or a list of texts under 'answers'")
    value = row[given[0]]
    if given == ["answer"]:
        return [_checked(value, "answer", label)]
    if not isinstance(value, list):
        raise KvcalError(f"{label}: answers is {_kind(value)}: give a list of texts")
    if not value:
        raise KvcalError(f"{label}: answers is empty: give one at least")
    return list(dict.fromkeys(_checked(each, "an answer", label) for each in value))


def _checked(value: Any, name: str, label: str) -> str:
    if not isinstance(value, str):
        advice = f'"{value}"' if type(value) in (int, float) else "text"
        raise KvcalError(f"{label}: {name} is {_kind(value)}, not text: give {advice}")
    if not value.strip():
        raise KvcalError(f"{label}: {name} is empty: give text, or leave the row out")
    check_characters(value, f"{label}: {name}")
    return value


def _kind(value: Any) -> str:
    return {
        dict: "an object",
        list: "a list",
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
    }.get(type(value), type(value).__name__)


def _sample(prompt: Prompt, tokenizer: Any, chat: bool) -> Sample:
    if chat:
        before, after = as_chat(tokenizer, prompt.history, prompt.context, prompt.question, prompt.label)
        return text_sample(tokenizer, (), before, after, prompt.answers, prompt.label)
    if prompt.history:
        raise KvcalError(
            f"{prompt.label}: messages need a chat template: "
            + ("leave --no-chat-template out" if has_template(tokenizer) else "this model's tokenizer has none")
            + ", or give context and question"
        )
    return text_sample(tokenizer, bos_tokens(tokenizer), prompt.context, prompt.question, prompt.answers, prompt.label)


def _hash(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(repr((list(prompt.history), prompt.context, prompt.question, prompt.answers)).encode())
    return digest.hexdigest()
