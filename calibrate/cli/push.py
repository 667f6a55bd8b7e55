from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from .options import artifact_argument
from .output import json_option, print_lines, print_result
from .verbosity import is_quiet


@click.command("push")
@artifact_argument()
@click.argument("repo_id", metavar="ORG/NAME")
@click.option(
    "--branch",
    "--revision",
    "branch",
    show_default="the main one",
    help="Commit to this branch, which is made if need be.",
)
@click.option("--private", is_flag=True, help="Make the repository private, if it is made now.")
@click.option("--message", help="Give the commit this message.")
@click.option("--slim", is_flag=True, help="Send only what decoding needs, as `calibrate slim` writes it.")
@json_option
def push_command(
    artifact: Path, repo_id: str, branch: str | None, private: bool, message: str | None, slim: bool, as_json: bool
) -> None:
    """Verify ARTIFACT and upload it to the Hub.

    It becomes, with its card, one commit of the model repository ORG/NAME. That needs a token with write access
    (`hf auth login`, or HF_TOKEN). Others load it with kvcal.load("ORG/NAME@REVISION").

    \b
    Example:
      calibrate push mistral-7b-wikitext me/mistral-7b-kvcal
    """
    from ..publish import push

    with _bars_on_terminals_only():
        pushed = push(artifact, repo_id, branch=branch, private=private, message=message, slim=slim)
    load = f'  artifact = load("{pushed.repo_id}@{pushed.commit}")'
    load_it = ("load it with", "  from kvcal import load", load)
    print_result(as_json, dataclasses.asdict(pushed), lambda: print_lines(pushed.url), pushed.url, *load_it)


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    silenced = not ((sys.stderr.isatty() and not is_quiet()) or are_progress_bars_disabled())
    if silenced:
        disable_progress_bars()
    try:
        yield
    finally:
        if silenced:
            enable_progress_bars()
