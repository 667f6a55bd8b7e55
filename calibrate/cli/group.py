"""The command group, and how errors reach the user: one line on stderr, exit code 2; 130 after Ctrl-C."""

from __future__ import annotations

import difflib
import os
import re
from importlib import import_module
from typing import Any

import click

from ...artifacts import KvcalError
from ..interrupts import Interrupted
from . import interrupted, verbosity
from .job import alone
from .types import TOKENS_HELP, TokenCount, TokenCounts
from .user_error import UserError

# In the order in which a new user meets them.
COMMANDS = {
    "demo": "demo",
    "pca": "pca",
    "analyze-rank": "analyze_rank",
    "cluster": "cluster",
    "plan": "plan",
    "share": "share",
    "xcla": "xcla",
    "export": "export",
    "evaluate": "evaluate",
    "report": "report",
    "inspect": "inspect_",
    "verify": "verify",
    "diff": "diff",
    "slim": "slim",
    "push": "push",
    "run": "run",
    "recipe": "recipe",
    "models": "listings",
    "datasets": "listings",
}


class Group(click.Group):
    """Loads a command's module when it is asked for, and turns our errors into one line."""

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        verbosity.reset()
        return super().make_context(*args, **extra)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f".{COMMANDS[cmd_name]}", __package__)
        command: click.Command = getattr(module, f"{cmd_name.replace('-', '_')}_command")
        return _completed(alone(command))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            advice = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
            raise UserError(f"no command {args[0]!r}: {advice}") from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return self._invoke(ctx)
        except click.exceptions.Exit:
            raise
        except BaseException as error:
            if (number := interrupted.signal_of(error)) is None:
                raise
            raise interrupted.ended(error, number, ctx.invoked_subcommand) from None

    def _invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Interrupted:
            raise
        except KvcalError as error:
            verbosity.detail_traceback(error)
            raise UserError(str(error)) from error
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else ctx.command_path
            raise UserError(f"{error.format_message()} (see `{command} --help`)") from error
        except BrokenPipeError:
            # The reader of our output left (`| head`): not an error, but nothing more can be written.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            ctx.exit(0)
        except OSError as error:  # the user's files and disk, not our doing
            verbosity.detail_traceback(error)
            raise UserError(
                f"{error.filename or 'standard output'}: {error.strerror or error}: check the path and the disk"
            ) from error


def _completed(command: click.Command) -> click.Command:
    """The command with what all commands have: --quiet and --verbose, a short help that is a whole sentence, and what
    numbers of tokens mean."""
    if "--quiet" in (name for parameter in command.params for name in parameter.opts):
        return command
    command.params += verbosity.verbosity_options()
    if command.callback is not None:
        command.callback = verbosity.detailed(command.callback)
    paragraph = " ".join((command.help or "").split("\n\n")[0].split())
    command.short_help = re.split(r"(?<=\.)\s", paragraph, maxsplit=1)[0]
    if any(isinstance(parameter.type, (TokenCount, TokenCounts)) for parameter in command.params):
        command.epilog = TOKENS_HELP
    return command


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True},
    params=verbosity.verbosity_options(),
)
@click.version_option(package_name="kvcal", message="%(prog)s %(version)s")
def cli() -> None:
    """Calibrate a language model's KV cache once, offline, into a verifiable artifact.

    \b
    Start with   calibrate demo
    then         calibrate pca --model mistral-7b --data wikitext
                 calibrate analyze-rank mistral-7b-wikitext
    """
