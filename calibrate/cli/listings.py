from __future__ import annotations

import click

from .output import json_option, print_lines, print_result, print_table


@click.command("models")
@json_option
def models_command(as_json: bool) -> None:
    """List the model aliases.

    For each it says what it resolves to, and whether it can be loaded right here, without a network.

    \b
    Example:
      calibrate models
    """
    from ..models.listing import listed

    found = listed()
    rows = [[alias, each["id"], each["here"] or "needs the Hub"] for alias, each in found.items()]
    without = [f"{alias} without the Hub: {each['install']}" for alias, each in found.items() if each["install"]]

    def show() -> None:
        print_table("models: any Hub id, folder or GGUF file works too", ["alias", "resolves to", "here"], rows)
        print_lines(*without)

    print_result(as_json, found, show)


@click.command("datasets")
@json_option
def datasets_command(as_json: bool) -> None:
    """List the data aliases.

    For each it says what it resolves to, and whether it can be read right here.

    \b
    Example:
      calibrate datasets
    """
    from ..data import listed

    found = listed()
    rows = [
        [alias, each["id"], each["here"] or ("not installed" if each["install"] else "needs the Hub")]
        for alias, each in found.items()
    ]
    install = [f"{alias}: {each['install']}" for alias, each in found.items() if each["install"]]

    def show() -> None:
        title = "data: any Hub id org/name[:config[:split]], file, folder or glob works too"
        print_table(title, ["alias", "resolves to", "here"], rows)
        print_lines(*install)

    print_result(as_json, found, show)
