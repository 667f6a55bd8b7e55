"""From a section of a recipe to the arguments of its command: names, types and defaults are the command's own."""

from __future__ import annotations

from typing import Any

import click

from ...artifacts import KvcalError
from ..recipe import Recipe, Section, unknown
from .types import TokenCount

STAGES = ("cluster", "xcla", "share", "plan", "evaluate")
LISTS = {"method", "rank", "keep", "tasks", "lengths"}
"""Options whose text is a comma list; in a recipe they may be YAML lists or numbers, too."""
_NOT_IN_RECIPES = {"force", "help", "json", "quiet", "resume", "verbose"}


def options_of(command: click.Command) -> dict[str, click.Option]:
    """Name in a recipe -> option; one that has several long names is there under each, the first one first."""
    options = [option for option in command.params if isinstance(option, click.Option)]
    names = [(name[2:].replace("-", "_"), option) for option in options for name in _long_names(option)]
    return {name: option for name, option in names if name not in _NOT_IN_RECIPES}


def _long_names(option: click.Option) -> list[str]:
    return [name for name in option.opts if name.startswith("--")]


def arguments(recipe: Recipe, section: Section, command: click.Command) -> list[str]:
    """The command line that a section stands for, without arguments that are no options.

    Raises:
        KvcalError: an unknown name or a value that the option does not take, with file and line.
    """
    known = options_of(command)
    given = []
    for name, value in section.settings.items():
        where = f"{recipe.where(section.lines[name])}: {section.command}.{name}"
        if name not in known:
            raise KvcalError(f"{recipe.where(section.lines[name])}: {section.command}: {unknown(name, known)}")
        option = known[name]
        flag = _long_names(option)[0]
        if option.is_flag:
            if type(value) is not bool:
                raise KvcalError(f"{where}: expected true or false, not {value!r}")
            given += [flag] if value else option.secondary_opts[:1]
            continue
        for text in _texts(where, name, option, value):
            try:
                option.type.convert(text, option, None)
            except click.BadParameter as error:
                raise KvcalError(f"{where}: {error.message}") from None
            given.append(f"{flag}={text}")
    return given


def _texts(where: str, name: str, option: click.Option, value: Any) -> list[str]:
    """A value as texts on a command line: several for an option that may be repeated."""
    if option.multiple and isinstance(value, dict):
        return [f"{key}={_comma_list(f'{where}.{key}', item)}" for key, item in value.items()]
    if option.multiple and isinstance(value, list):
        return [_scalar(where, item, (str,), "text") for item in value]
    if name in LISTS:
        return [_comma_list(where, value)]
    if isinstance(option.type, TokenCount):
        return [_scalar(where, value, (int, str), "a number of tokens, e.g. 8192 or 8k")]
    if isinstance(option.type, click.types.IntParamType):
        return [_scalar(where, value, (int,), "a whole number")]
    if isinstance(option.type, click.types.FloatParamType):
        return [_scalar(where, value, (int, float), "a number")]
    if isinstance(option.type, click.Choice):
        return [_scalar(where, value, (str, int), f"one of {', '.join(map(str, option.type.choices))}")]
    return [_scalar(where, value, (str,), "text")]


def _comma_list(where: str, value: Any) -> str:
    items = value if isinstance(value, list) else [value]
    if not items:
        raise KvcalError(f"{where}: an empty list: leave the line out")
    return ",".join(
        _scalar(where, item, (str, int, float, bool), "text, a number, or a list of them") for item in items
    )


def _scalar(where: str, value: Any, kinds: tuple[type, ...], expected: str) -> str:
    if type(value) not in kinds:
        raise KvcalError(f"{where}: expected {expected}, not {repr(value)[:40]}")
    return str(value)
