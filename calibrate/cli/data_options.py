"""`--data`, which may be repeated, `--split` and `--text-column`: the same in every command that takes text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from ...artifacts.errors import one_line
from .completion import complete_data
from .output import say

Command = TypeVar("Command", bound=Callable[..., Any])

_FORMS = "an alias, a Hub id org/name[:config[:split]], a file, a folder or a glob. Several are mixed."


def data_options(what: str, split_example: str) -> Callable[[Command], Command]:
    """A decorator that adds these options.

    Args:
        what: for the help, e.g. "Calibrate on this text".
    """

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    options: list[Callable[[Command], Command]] = [
        click.option(
            "--data",
            "data_spec",
            metavar="DATA",
            multiple=True,
            shell_complete=complete_data,
            help=f"{what}: {_FORMS}",
        ),
        click.option("--split", metavar="NAME", help=f"Take this split of the data set, e.g. {split_example}."),
        click.option(
            "--text-column",
            metavar="NAME",
            show_default="the only choice",
            help="Take the text or the chat from this column of a table, or from several as NAME+NAME.",
        ),
    ]
    return add


def say_left(source: Mapping[str, Any]) -> None:
    """Name the files of a source of which nothing was read."""
    for each in source.get("sources", [source]):
        for key, why in (
            ("skipped", f"no text files (see `calibrate {click.get_current_context().info_name} --help`)"),
            ("unread", "empty, or not needed for the tokens asked for"),
        ):
            if names := each.get(key):
                count = each[f"num_{key}"]
                more = f" and {count - 5} more" if count > 5 else ""
                say(one_line(f"data {each['id']}: {count} of its files not read, {why}: {', '.join(names[:5])}{more}"))
