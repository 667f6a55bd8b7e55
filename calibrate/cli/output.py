"""What commands print: text for people, or JSON with nothing else on stdout."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ...artifacts.writing import write_atomically

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print machine-readable results to stdout, nothing else."
)


def print_json(value: Any) -> None:
    """Strict JSON: NaN and infinities, which JSON does not have, become null."""
    click.echo(json.dumps(_finite(value), indent=1))


def say(message: str) -> None:
    """A line for people, on stderr, so that stdout holds results only."""
    click.echo(message, err=True)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for column, name in enumerate(header):
        table.add_column(name, justify="left" if column == 0 else "right")
    for row in rows:
        table.add_row(*[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row])
    # Off a terminal, a fixed width keeps columns from wrapping in logs and pipes; on a narrow one a wrapped line can
    # still be read, a cell cut off cannot.
    console = Console()
    needed = console.measure(table, options=console.options.update(width=120)).maximum
    Console(width=max(console.width, needed) if sys.stdout.isatty() else 120).print(table)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[..., None]]:
    """Yields update(done, total, note="") for a bar with elapsed and remaining time; silent when stderr is no
    terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total, note="": None
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

    times = (MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    columns = (TextColumn(title), BarColumn(), *times, TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None, note="")
        yield lambda done, total, note="": bar.update(task, completed=done, total=total, note=note)


@contextmanager
def working(title: str) -> Iterator[None]:
    """A spinner for steps that cannot tell how far they are; silent when stderr is no terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(title):
        yield


def _check_plot(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Said before the work, not after it."""
    if path is not None and path.suffix.lower() != ".png":
        raise click.BadParameter(f"{path}: figures are written as PNG, give a name that ends in .png")
    if path is not None and not path.parent.is_dir():
        raise click.BadParameter(f"{path.parent} is not a folder: make it first")
    return path


plot_option = click.option(
    "--plot", type=click.Path(path_type=Path), callback=_check_plot, help="Write the figure to this PNG file."
)


def write_plot(path: Path, png: bytes) -> None:
    write_atomically(path, png)
    say(f"figure: {path}")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
