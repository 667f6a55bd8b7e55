"""What is asked in an evaluation: the options, and the prompts that they mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from ...artifacts import KvcalError
from .data_options import say_left
from .output import progress_bar, say, working

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS: list[Callable[[Any], Any]] = [
    click.option(
        "--prefix", type=click.IntRange(2), default=1024, show_default=True, help="Tokens that are prefilled densely."
    ),
    click.option(
        "--continuation", type=click.IntRange(2), default=256, show_default=True, help="Tokens decoded after them."
    ),
    click.option(
        "--windows", type=click.IntRange(1), default=8, show_default=True, help="Pieces of text for perplexity."
    ),
    click.option(
        "--tasks",
        help="Comma list of perplexity, passkey, multikey, `ruler` and RULER's names (niah_single_1, vt, …).  "
        "[default: the first three; none with --prompts and no --data]",
    ),
    click.option("--lengths", help="Comma list of tokens that tasks are to have.  [default: --prefix]"),
    click.option(
        "--episodes", type=click.IntRange(1), default=20, show_default=True, help="Questions per task and length."
    ),
    click.option(
        "--prompts",
        "prompt_files",
        type=click.Path(path_type=Path),
        multiple=True,
        help="JSON lines of context, question and answer, or chats; each file is a task.",
    ),
    click.option(
        "--match",
        type=click.Choice(["exact", "part"]),
        default="exact",
        show_default=True,
        help="Whether the first line said is to be an answer of --prompts, or an answer to be part of what is said.",
    ),
    click.option(
        "--max-new-tokens",
        type=click.IntRange(1),
        help="Decoded for --prompts.  [default: the longest answer's, and 32]",
    ),
    click.option(
        "--chat-template/--no-chat-template",
        default=True,
        show_default=True,
        help="Put RULER's tasks and --prompts into the model's chat template, if it has one.",
    ),
    click.option(
        "--question",
        type=click.Choice(["decoded", "prefilled"]),
        default="decoded",
        show_default=True,
        help="How a task's question is read: token by token through the cache, or with the context in the prefill.",
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Of facts, their places and their fillers."),
]


def prompt_options(command: Command) -> Command:
    """Add the options of prompts to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True)
class PromptOptions:
    """What `prompt_options` collects, checked before a model is loaded."""

    described: dict[str, Any]
    """The arguments of `make_prompts` except the files, as results state them."""
    files: tuple[Path, ...]

    @classmethod
    def of(
        cls, with_text: bool, *, tasks: str | None, lengths: str | None, prompt_files: tuple[Path, ...], **others: Any
    ) -> PromptOptions:
        """
        Args:
            with_text: whether --data is given.

        Raises:
            KvcalError, click.UsageError: unknown tasks, tasks without their text or package, faulty files of prompts.
        """
        from ..evaluation.tasks.prompts_file import read_all_prompts

        names = _task_names(tasks, bool(prompt_files and not with_text))
        if not with_text and _needs_text(names):
            raise click.UsageError(
                "give --data: text that the artifact was not calibrated on, e.g. stdlib --split heldout"
            )
        read_all_prompts(prompt_files)
        return cls({**others, "tasks": names, "lengths": _numbers("--lengths", lengths)}, prompt_files)

    def find_text(self, spec: Sequence[str], split: str | None, text_column: str | None) -> Any:
        """What `open_data` finds; None where no task is made of text."""
        from ..data import open_data

        if _needs_text(self.described["tasks"]):
            with working("finding the text"):
                return open_data(spec, split, text_column=text_column, seed=self.described["seed"])
        if spec:
            say("--data: no task here is made of text, so nothing of it is read")
        return None

    def make(self, data: Any, loaded: Any) -> Any:
        """The `Prompts`, for a loaded model."""
        from ..evaluation.prompts import make_prompts
        from ..models import max_context

        with progress_bar("making prompts") as progress:
            prompts = make_prompts(
                () if data is None else data,
                loaded.tokenizer,
                **self.described,
                name=str(data.source["id"]) if data else "",
                prompt_files=self.files,
                most_tokens=max_context(loaded.model.config),
                progress=progress,
            )
        say_left(prompts.source)
        return prompts


def _task_names(tasks: str | None, only_prompts: bool) -> list[str]:
    """
    Args:
        only_prompts: without --tasks, only --prompts are asked.
    """
    from ..evaluation.tasks.names import ON_TEXT, parse_tasks

    if tasks is None:
        return [] if only_prompts else list(ON_TEXT)
    return parse_tasks(words(tasks))


def _needs_text(tasks: Sequence[str]) -> bool:
    from ..evaluation.tasks.names import ON_TEXT

    return bool(set(tasks) & set(ON_TEXT))


def words(text: str) -> list[str]:
    """The words of a comma list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(option: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    found = words(text)
    if not found or not all(word.isdecimal() and len(word) < 10 for word in found):
        raise KvcalError(f"{option} {text!r}: give whole numbers separated by commas, e.g. 512,1024")
    return [int(word) for word in found]
