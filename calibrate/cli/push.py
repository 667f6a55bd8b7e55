from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from .output import json_option, print_json, print_lines


@click.command("push")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("repo_id", metavar="ORG/NAME")
@click.option("--branch", "--revision", "branch", help="Branch to commit to, made if need be.  [default: the main one]")
@click.option("--private", is_flag=True, help="Make the repository private, if it is made now.")
@click.option("--message", help="Of the commit.")
@click.option("--slim", is_flag=True, help="Send only what decoding needs, as `calibrate slim` writes it.")
@json_option
def push_command(
    artifact: Path, repo_id: str, branch: str | None, private: bool, message: str | None, slim: bool, as_json: bool
) -> None:
    """Verify ARTIFACT and upload it with its card to the Hub, as one commit of the model repository ORG/NAME.

    Needs a token with write access (`hf auth login`, or HF_TOKEN). Others load it with
    kvcal.runtime.load("ORG/NAME@REVISION").

    \b
    Example:
      calibrate push mistral-7b-wikitext me/mistral-7b-kvcal
    """
    from ..publish import push

    with _bars_on_terminals_only():
        pushed = push(artifact, repo_id, branch=branch, private=private, message=message, slim=slim)
    if as_json:
        print_json(dataclasses.asdict(pushed))
        return
    load = f'artifact = load("{pushed.repo_id}@{pushed.commit}")'
    print_lines(pushed.url, "", "load it with", "  from kvcal.runtime import load", f"  {load}")


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    silenced = not (sys.stderr.isatty() or are_progress_bars_disabled())
    if silenced:
        disable_progress_bars()
    try:
        yield
    finally:
        if silenced:
            enable_progress_bars()
