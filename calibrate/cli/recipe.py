from __future__ import annotations

from pathlib import Path

import click

from ...artifacts import KvcalError
from .options import artifact_argument, force_option
from .output import NewFile, say
from .pca import pca_command
from .recipe_arguments import options_of


def _is_recipe(path: Path) -> bool:
    from ..recipe import read_recipe
    from .recipe_arguments import STAGES

    try:
        read_recipe(path, STAGES)
    except KvcalError:
        return False
    return True


@click.command("recipe")
@artifact_argument()
@click.option(
    "-o",
    "--output",
    type=NewFile(_is_recipe, "a recipe", by_force=True),
    help="Write the recipe to this file instead of printing it.",
)
@force_option("Replace a recipe that is at --output; nothing but a recipe is ever replaced.")
def recipe_command(artifact: Path, output: Path | None, force: bool) -> None:
    """Write the recipe that makes ARTIFACT again.

    It is made from what the manifest says, and `calibrate run --recipe` runs it.

    \b
    Example:
      calibrate recipe mistral-7b-wikitext -o mistral-7b-wikitext.yaml
    """
    from ...artifacts import load
    from ...artifacts.writing import write_atomically
    from ..recipe_of import recipe_of

    text = recipe_of(load(artifact), options_of(pca_command))
    if output is None:
        click.echo(text, nl=False)
        return
    write_atomically(output, text.encode())
    say(f"recipe: {output}")
