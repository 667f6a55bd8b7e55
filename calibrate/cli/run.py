from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ...artifacts import KvcalError
from ..recipe import Recipe, Section, read_recipe
from .options import force_option
from .output import json_option, print_result, say
from .pass_options import PassOptions
from .recipe_arguments import STAGES, arguments, options_of


@click.command("run")
@click.option("--recipe", "path", type=click.Path(path_type=Path), required=True, help="Run what this YAML file says.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    show_default="the recipe's",
    help="Write the artifact to this folder.",
)
@force_option("Replace an artifact or results of other settings; nothing but these is ever replaced.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run of the same recipe.")
@json_option
def run_command(path: Path, output: Path | None, force: bool, resume: bool, as_json: bool) -> None:
    """Calibrate as a recipe says.

    The pass of `calibrate pca` comes first, then the recipe's stages in their order. A recipe is checked whole
    before anything runs. Its names are those of the commands' options.

    \b
    Example:
      calibrate run --recipe mistral-7b-wikitext.yaml
    """
    recipe = read_recipe(path, STAGES)
    flags = {"--force": force, "--resume": resume, "--json": as_json}
    pca, folder = _prepare_pass(recipe, output, flags)
    contexts = [pca, *(_prepare(recipe, section, folder, flags) for section in recipe.stages)]
    results: dict[str, Any] = {"artifact": str(folder), "stages": []}
    for context in contexts:
        name = context.info_name
        say(f"{path}: {name}")
        printed = io.StringIO()
        with context, contextlib.redirect_stdout(printed) if as_json else contextlib.nullcontext():
            context.command.invoke(context)
        if as_json:
            results["stages"].append({str(name): json.loads(printed.getvalue())})
        if context is pca:
            _check_expected(recipe, folder)
    print_result(as_json, results, lambda: None)


def _prepare_pass(recipe: Recipe, output: Path | None, flags: Mapping[str, bool]) -> tuple[click.Context, Path]:
    section = recipe.pca
    if output is not None:
        section = dataclasses.replace(section, settings={**section.settings, "output": str(output)})
        section = dataclasses.replace(section, lines={"output": 1, **section.lines})
    context = _context(recipe, section, [], flags)
    fields = {field.name for field in dataclasses.fields(PassOptions)}
    options = PassOptions(**{name: value for name, value in context.params.items() if name in fields})
    return context, options.output_folder()


def _prepare(recipe: Recipe, section: Section, folder: Path, flags: Mapping[str, bool]) -> click.Context:
    command = command_of(section.command)
    if section.command in ("evaluate", "plan") and "data" not in section.settings:
        where = f"{recipe.where(section.line)}: {section.command}"
        raise KvcalError(f"{where}: no data: give text that was not calibrated on")
    if "model" in options_of(command) and "model" not in section.settings:
        settings = {"model": recipe.pca.settings["model"], **section.settings}
        section = dataclasses.replace(section, settings=settings, lines={"model": section.line, **section.lines})
    flags = {**flags, "--resume": flags["--resume"] and section.settings.get("uptrain") is True}
    if section.command == "share":  # trained weights: a recipe says `overwrite: true` where they may go
        flags["--force"] = False
    return _context(recipe, section, ["--", str(folder)], flags)


def _context(recipe: Recipe, section: Section, positional: list[str], flags: Mapping[str, bool]) -> click.Context:
    """The command as if it had been given on a command line: parsed, with its own defaults."""
    command = command_of(section.command)
    given = arguments(recipe, section, command)
    known = {name for parameter in command.params for name in parameter.opts}
    wanted = [flag for flag, wished in flags.items() if wished and flag in known]
    try:
        return command.make_context(section.command, [*given, *wanted, *positional], parent=click.get_current_context())
    except click.UsageError as error:
        raise KvcalError(f"{recipe.where(section.line)}: {section.command}: {error.format_message()}") from None


def command_of(name: str) -> click.Command:
    """The command of the group by its name."""
    group = click.get_current_context().find_root().command
    assert isinstance(group, click.Group)
    command = group.get_command(click.get_current_context(), name)
    assert command is not None
    return command


def _check_expected(recipe: Recipe, folder: Path) -> None:
    """Raise KvcalError when the recipe states which text and weights it is about, and these were others."""
    from ...artifacts.manifest import read_manifest

    found = read_manifest(folder)[0]
    sums = {"text_sha256": found.data["content_sha256"], "weights_sha256": found.model.weights_sha256}
    for name, expected in recipe.expect.items():
        if sums[name] != expected:
            what = {"text_sha256": "text (or its tokens)", "weights_sha256": "weights"}[name]
            raise KvcalError(
                f"{folder}: calibrated on other {what} than {recipe.path} expects ({name} {sums[name][:12]}…, "
                f"expected {expected[:12]}…): give those of then, or leave expect out"
            )
