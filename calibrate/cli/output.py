"""What commands print: text for people, or JSON with nothing else on stdout."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ...artifacts import KvcalError
from ...artifacts.errors import one_line
from ...artifacts.places import check_new_file
from .logged import logged, switched_off
from .numbers import plain
from .verbosity import is_quiet, timed

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print machine-readable results to stdout, nothing else."
)


def print_json(value: Any) -> None:
    """Strict JSON: NaN and infinities, which JSON does not have, become null."""
    click.echo(json.dumps(_finite(value), indent=1))


def print_lines(*lines: object) -> None:
    """Results for people, a line each, whatever names are in them; all that commands print goes through here."""
    for line in lines:
        click.echo(one_line(line))


def print_result(as_json: bool, value: Any, show: Callable[[], None], place: object | None = None, *steps: str) -> None:
    """What a command has found: as JSON, for people, or with --quiet in short.

    Args:
        value: for JSON.
        show: prints it for people.
        place: where it was written; --quiet prints this alone.
        steps: lines for people about what to do next.
    """
    if as_json:
        print_json(value)
    elif is_quiet() and place is not None:
        print_lines(place)
    else:
        show()
        if steps and not is_quiet():
            print_lines("", *steps)


def say(message: str) -> None:
    """A line for people, on stderr, so that stdout holds results only; none with --quiet."""
    if not is_quiet():
        click.echo(one_line(message), err=True)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Cells are quoted as they are, rich's markup in them included; line ends stay in the header only."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(one_line(title), style="bold"), title_justify="left", header_style="bold")
    for column, name in enumerate(header):
        lines = [one_line(line) for line in name.split("\n")]
        table.add_column(Text("\n".join(lines)), justify="left" if column == 0 else "right")
    for row in rows:
        table.add_row(*[Text(plain(cell) if isinstance(cell, float) else one_line(cell)) for cell in row])
    # Off a terminal, a fixed width keeps columns from wrapping in logs and pipes; on a narrow one a wrapped line can
    # still be read, a cell cut off cannot.
    console = Console()
    needed = console.measure(table, options=console.options.update(width=120)).maximum
    Console(width=max(console.width, needed) if sys.stdout.isatty() else 120).print(table)


@contextmanager
def progress_bar(title: str, estimate: bool = True) -> Iterator[Callable[..., None]]:
    """Yields update(done, total, note="") for a bar with elapsed and remaining time; lines where stderr is no
    terminal. `estimate`: False where the notes say how long it will take."""
    with timed(title), _bar(title, estimate) as update:
        yield update


@contextmanager
def _bar(title: str, estimate: bool) -> Iterator[Callable[..., None]]:
    if switched_off() or is_quiet():
        yield lambda done, total, note="": None
        return
    if not sys.stderr.isatty():
        with logged(title, say, estimate) as update:
            yield update
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    times = (MofNCompleteColumn(), TimeElapsedColumn(), *([TimeRemainingColumn()] if estimate else []))
    texts = (TextColumn("{task.description}", markup=False), TextColumn("{task.fields[note]}", markup=False))
    with Progress(texts[0], BarColumn(), *times, texts[1], console=Console(stderr=True)) as bar:
        task = bar.add_task(one_line(title), total=None, note="")
        yield lambda done, total, note="": bar.update(task, completed=done, total=total, note=one_line(note))


@contextmanager
def working(title: str) -> Iterator[None]:
    """A spinner for steps that cannot tell how far they are; lines where stderr is no terminal."""
    with timed(title), _spinner(title):
        yield


@contextmanager
def _spinner(title: str) -> Iterator[None]:
    if switched_off() or is_quiet():
        yield
        return
    if not sys.stderr.isatty():
        with logged(title, say):
            yield
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text(one_line(title))):
        yield


class NewFile(click.Path):
    """The name of a file to be written, checked when the command line is read. It replaces none but its own kind.

    Args:
        replaceable: tells by its content whether a file may be replaced; None: it may not.
        what: a file that may be, for errors.
        suffix: that names must have.
        by_force: replace only with --force.
    """

    def __init__(
        self,
        replaceable: Callable[[Path], bool] | None = None,
        what: str = "",
        suffix: str = "",
        by_force: bool = False,
    ):
        super().__init__(path_type=Path)
        self.replaceable, self.what, self.suffix, self.by_force = replaceable, what, suffix, by_force

    def convert(self, value: Any, parameter: click.Parameter | None, ctx: click.Context | None) -> Path:
        if str(value).endswith(("/", "/.")):
            self.fail(f"{value}: names a folder: give the name of a file", parameter, ctx)
        path = Path(os.fsdecode(super().convert(value, parameter, ctx)))
        if self.suffix and path.suffix.lower() != self.suffix:
            self.fail(f"{path}: give a name that ends in {self.suffix}", parameter, ctx)
        forced = ctx is not None and ctx.params.get("force")  # --force is eager
        if self.by_force and not forced and path.is_file() and not path.is_symlink():
            self.fail(
                f"{path}: already exists: choose another name, or give --force to replace {self.what}", parameter, ctx
            )
        try:
            check_new_file(path, self.replaceable, self.what)
        except KvcalError as error:
            self.fail(str(error), parameter, ctx)
        return path


def is_png(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8) == b"\x89PNG\r\n\x1a\n"


plot_option = click.option(
    "--plot", type=NewFile(is_png, "a PNG file", ".png"), help="Write the figure to this PNG file."
)


def write_plot(path: Path, png: bytes) -> None:
    from ...artifacts.writing import write_atomically

    write_atomically(path, png)
    say(f"figure: {path}")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
