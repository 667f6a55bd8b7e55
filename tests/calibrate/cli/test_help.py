"""Help texts of all commands: whole sentences, none cut, defaults shown, one name for one thing."""

from __future__ import annotations

import re

import click
import pytest
from cli_runs import run

from kvcal.calibrate.cli import cli
from kvcal.calibrate.cli.group import COMMANDS
from kvcal.calibrate.cli.types import TOKENS_HELP, Dtype, TokenCount, TokenCounts


def command_of(name: str) -> click.Command:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return command


def options_of(name: str) -> list[click.Option]:
    return [option for option in command_of(name).params if isinstance(option, click.Option)]


ALL = [(name, option) for name in COMMANDS for option in options_of(name)]
IDS = [f"{name} {option.opts[-1]}" for name, option in ALL]


def is_sentence(text: str) -> bool:
    """It begins with a capital (or a name that has none) and ends with a full stop; nothing is left out at its end."""
    return bool(re.match(r"[A-Z]|faiss|`", text)) and text.endswith(".") and not text.endswith(("..", "….", " ."))


@pytest.mark.parametrize(("name", "option"), ALL, ids=IDS)
def test_an_option_is_explained_by_whole_sentences(name: str, option: click.Option) -> None:
    assert option.help and is_sentence(option.help)
    assert len(option.help.split()) >= 4, "a verb and what it is about"
    assert "[default:" not in option.help, "show_default says it, in one form"


@pytest.mark.parametrize(("name", "option"), ALL, ids=IDS)
def test_a_default_is_shown(name: str, option: click.Option) -> None:
    """Of flags and of what may be left out without another value taking its place there is none."""
    shown = run(name, "--help").stdout.split("Options:")[1]
    text = re.split(r"\n  (?=-)", shown)[1 + [other.opts for other in options_of(name)].index(option.opts)]
    default = command_of(name).make_context(name, [], resilient_parsing=True).params.get(option.name)
    states = default is not None and not option.is_flag and not option.multiple and not option.required
    told = isinstance(option.show_default, str) or (states and option.show_default is not False)
    assert ("[default:" in text) == (told or bool(option.secondary_opts))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_explained_by_whole_sentences(name: str) -> None:
    before_example = (command_of(name).help or "").partition("\b")[0]
    paragraphs = [" ".join(part.split()) for part in before_example.split("\n\n") if part.strip()]
    assert paragraphs and all(map(is_sentence, paragraphs))


def test_the_list_of_commands_has_whole_sentences_only() -> None:
    listed = run("--help").stdout.split("Commands:\n")[1]
    entries = re.findall(r"^  (\S+) +(.+(?:\n {4,}.+)*)", listed, re.MULTILINE)
    assert [name for name, _ in entries] == list(COMMANDS)
    for _, text in entries:
        assert is_sentence(" ".join(text.split())) and "..." not in text


@pytest.mark.parametrize(("name", "option"), ALL, ids=IDS)
def test_one_form_for_one_thing(name: str, option: click.Option) -> None:
    """What counts tokens takes 8k, what is a dtype takes bf16, and --output has its short form, in every command."""
    long = [text for text in option.opts if text.startswith("--")]
    tokens = {"--num-tokens", "--seq-len", "--prefix", "--continuation", "--max-new-tokens", "--reservoir"}
    if tokens & {*long}:
        assert isinstance(option.type, TokenCount)
    if "--lengths" in long:
        assert isinstance(option.type, TokenCounts)
    if "--dtype" in long:
        assert isinstance(option.type, Dtype)
    if "--output" in long:
        assert "-o" in option.opts
    if "--model" in long or "--data" in long:
        assert option._custom_shell_complete is not None
    assert re.fullmatch(r"--[a-z]+(-[a-z]+)*", long[0])


@pytest.mark.parametrize("name", COMMANDS)
def test_what_k_means_stands_where_tokens_are_counted(name: str) -> None:
    counted = any(isinstance(option.type, (TokenCount, TokenCounts)) for option in options_of(name))
    assert (" ".join(TOKENS_HELP.split()) in " ".join(run(name, "--help").stdout.split())) == counted


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_can_be_quiet_and_verbose(name: str) -> None:
    names = {text for option in options_of(name) for text in option.opts}
    assert {"-q", "--quiet", "-v", "--verbose"} <= names
