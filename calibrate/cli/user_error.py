"""What ends a command: one line on stderr, and an exit code."""

from __future__ import annotations

import click

from ...artifacts.errors import one_line


class UserError(click.ClickException):
    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(one_line(" ".join(message.split())))
        self.exit_code = exit_code  # type: ignore[misc]  # of click a class has one; ours have their own
