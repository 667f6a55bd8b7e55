"""What is asked in an evaluation: the options, and the prompts that they mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from .completion import complete_tasks
from .data_options import say_left
from .output import progress_bar, say, working
from .types import TokenCount, TokenCounts

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS: list[Callable[[Any], Any]] = [
    click.option("--prefix", type=TokenCount(2), default="1k", help="Prefill this many tokens densely."),
    click.option("--continuation", type=TokenCount(2), default=256, help="Decode this many tokens after them."),
    click.option(
        "--windows", type=click.IntRange(1), default=8, help="Measure perplexity on this many pieces of text."
    ),
    click.option(
        "--tasks",
        metavar="NAMES",
        shell_complete=complete_tasks,
        show_default="the first three; none with --prompts and no --data",
        help="Ask these tasks, a comma list of perplexity, passkey, multikey, `ruler` and names of RULER's (e.g. vt).",
    ),
    click.option(
        "--lengths",
        type=TokenCounts(),
        show_default="--prefix",
        help="Ask tasks in contexts of these numbers of tokens, a comma list.",
    ),
    click.option(
        "--episodes", type=click.IntRange(1), default=20, help="Ask this many questions of each task and length."
    ),
    click.option(
        "--prompts",
        "prompt_files",
        type=click.Path(path_type=Path),
        multiple=True,
        help="Ask what is in this file, JSON lines of context, question and answer, or of chats; each file is a task.",
    ),
    click.option(
        "--match",
        type=click.Choice(["exact", "part"]),
        default="exact",
        help="Count an answer to --prompts when it is exactly the first line said, or part of what is said.",
    ),
    click.option(
        "--max-new-tokens",
        type=TokenCount(),
        show_default="as the longest answer has, and 32",
        help="Decode this many tokens of an answer to --prompts.",
    ),
    click.option(
        "--chat-template/--no-chat-template",
        default=True,
        help="Put RULER's tasks and --prompts into the model's chat template, if it has one.",
    ),
    click.option(
        "--question",
        type=click.Choice(["decoded", "prefilled"]),
        default="decoded",
        help="Read a task's question token by token through the cache, or with the context in the prefill.",
    ),
    click.option("--seed", type=int, default=0, help="Draw facts, their places and their fillers by this seed."),
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
    def of(cls, with_text: bool, *, tasks: str | None, prompt_files: tuple[Path, ...], **others: Any) -> PromptOptions:
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
        return cls({**others, "tasks": names}, prompt_files)

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
