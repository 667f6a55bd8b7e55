"""Commands as a user runs them: what they print, or the one line with which they refuse."""

from __future__ import annotations

from typing import Any

from click.testing import CliRunner, Result

from kvcal.calibrate.cli import cli


def invoke(*arguments: Any) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def run(*arguments: Any) -> Result:
    result = invoke(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def refused(*arguments: Any) -> str:
    """The one line of an error, after checking that it is one line on stderr and the exit code is 2."""
    result = invoke(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    return line
