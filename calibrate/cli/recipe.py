from __future__ import annotations

from pathlib import Path

import click

from ...artifacts import KvcalError, load
from ...artifacts.writing import write_atomically
from .output import say
from .pca import pca_command
from .recipe_arguments import options_of


@click.command("recipe")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write it to this file.  [default: print it]")
def recipe_command(artifact: Path, output: Path | None) -> None:
    """The recipe that makes ARTIFACT again, from what its manifest says; for `calibrate run --recipe`.

    \b
    Example:
      calibrate recipe mistral-7b-wikitext -o mistral-7b-wikitext.yaml
    """
    from ..recipe_of import recipe_of

    if output is not None and output.exists():
        raise KvcalError(f"{output}: already exists: choose another --output or remove it")
    text = recipe_of(load(artifact), options_of(pca_command))
    if output is None:
        click.echo(text, nl=False)
        return
    write_atomically(output, text.encode())
    say(f"recipe: {output}")
