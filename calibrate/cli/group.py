"""The command group, and how errors reach the user: one line on stderr, exit code 2."""

from __future__ import annotations

import difflib
import os
from importlib import import_module
from typing import Any

import click

from ...artifacts import KvcalError
from ...artifacts.errors import one_line
from .job import alone

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

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f".{COMMANDS[cmd_name]}", __package__)
        command: click.Command = getattr(module, f"{cmd_name.replace('-', '_')}_command")
        return alone(command)

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
            return super().invoke(ctx)
        except KvcalError as error:
            raise UserError(str(error)) from error
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "calibrate"
            raise UserError(f"{error.format_message()} (see `{command} --help`)") from error
        except KeyboardInterrupt:
            raise UserError(
                "interrupted: nothing on the disk was damaged; repeat the command to go on (pca: with --resume)"
            ) from None
        except BrokenPipeError:
            # The reader of our output left (`| head`): not an error, but nothing more can be written.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            ctx.exit(0)
        except OSError as error:  # the user's files and disk, not our doing
            raise UserError(
                f"{error.filename or 'standard output'}: {error.strerror or error}: check the path and the disk"
            ) from error


class UserError(click.ClickException):
    exit_code = 2

    def __init__(self, message: str):
        super().__init__(one_line(" ".join(message.split())))


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="kvcal", prog_name="calibrate")
def cli() -> None:
    """Calibrate a language model's KV cache once, offline, into a verifiable artifact.

    \b
    Start with   calibrate demo
    then         calibrate pca --model mistral-7b --data wikitext
                 calibrate analyze-rank mistral-7b-wikitext
    """
