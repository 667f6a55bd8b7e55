"""What ends a command: one line on stderr, and an exit code."""

from __future__ import annotations

import signal

import click

from ...artifacts.errors import one_line


class UserError(click.ClickException):
    exit_code = 2

    def __init__(self, message: str):
        super().__init__(one_line(" ".join(message.split())))


class EndedByInterrupt(UserError):
    exit_code = 128 + signal.SIGINT


class EndedBySigterm(UserError):
    exit_code = 128 + signal.SIGTERM
