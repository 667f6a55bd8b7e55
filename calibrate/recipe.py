"""Whole runs in one YAML file: parsed without executing anything, and every value with the line that it stands in.

    recipe: 1
    model: mistral-7b
    data: wikitext
    output: mistral-7b-wikitext
    pca: {num_tokens: 131072}
    stages:
      - cluster: {tokens_per_cluster: 80}
      - evaluate: {data: "wikitext:wikitext-2-raw-v1:test", method: [loki, h2o]}

What may stand in `pca` and in a stage are the options of the command of that name (`calibrate.cli.recipe_arguments`).
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..artifacts import KvcalError
from ..artifacts.missing import check_exists

VERSION = 1
KEYS = ("recipe", "model", "data", "output", "pca", "stages", "expect")
EXPECTED = ("text_sha256", "weights_sha256")
MOST_BYTES = 1 << 16
"""YAML is read slowly, and a recipe of this size is none."""
_MOST_LEVELS = 10


@dataclass(frozen=True)
class Section:
    """Settings of one command, by the names of its options with underscores."""

    command: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    lines: Mapping[str, int] = field(default_factory=dict)
    line: int = 1


@dataclass(frozen=True)
class Recipe:
    """What a recipe file says; the values of sections are not checked yet."""

    path: Path
    pca: Section
    """With `model` and `data`, and `output` where the recipe has one."""
    stages: tuple[Section, ...]
    """In the order in which they are to run."""
    expect: Mapping[str, str]
    """sha256 of the text's blocks and of the model's weights, where the recipe states them."""

    def where(self, line: int) -> str:
        return f"{self.path}:{line}"


def read_recipe(path: str | os.PathLike[str], stages: Collection[str]) -> Recipe:
    """Parse a recipe.

    Args:
        stages: commands that a recipe may run after `pca`.

    Raises:
        KvcalError: cannot be read, is no YAML, or has another form; with file and line.
    """
    path = Path(path)
    reader = _Reader(path)
    found = reader.mapping(reader.parse(), "the recipe", KEYS)
    version = found.get("recipe")
    if version is None or type(version.value) is not int or version.value != VERSION:
        line = version.line if version else 1
        raise KvcalError(f"{path}:{line}: a recipe starts with the line `recipe: {VERSION}`, its version")
    top: dict[str, Any] = {name: reader.text(found[name], name) for name in ("model", "output") if name in found}
    if "data" in found:
        top["data"] = reader.texts(found["data"], "data")
    for name in ("model", "data"):
        if name not in top:
            raise KvcalError(f"{path}:1: no {name}: add the line `{name}: …`")
    pca = reader.section("pca", found.get("pca"), 1)
    for name in top.keys() & pca.settings.keys():
        raise KvcalError(f"{path}:{pca.lines[name]}: pca.{name}: stands outside of pca in a recipe")
    lines = {**pca.lines, **{name: found[name].line for name in top}}
    pca = Section("pca", {**pca.settings, **top}, lines, pca.line)
    expect = reader.mapping(found.get("expect"), "expect", EXPECTED)
    sums = {name: reader.text(value, name) for name, value in expect.items()}
    for name, text in sums.items():
        if not re.fullmatch("[0-9a-f]{64}", text):
            raise KvcalError(f"{path}:{expect[name].line}: expect.{name}: is no sha256 of 64 hex digits")
    return Recipe(path, pca, tuple(reader.stages(found.get("stages"), stages)), sums)


@dataclass(frozen=True)
class _Value:
    value: Any
    """The value as parsed, with all that is in it where it is a mapping or a list."""
    line: int
    node: Any


class _Reader:
    def __init__(self, path: Path):
        self.path = path

    def parse(self) -> _Value:
        import yaml

        check_exists(self.path)
        try:
            with self.path.open("rb") as file:
                data = file.read(MOST_BYTES + 1)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise KvcalError(f"{self.path}: cannot be read ({reason}): give the path of a recipe") from None
        if len(data) > MOST_BYTES:
            raise KvcalError(f"{self.path}: larger than {MOST_BYTES} bytes, not a recipe")
        try:
            # What safe_load does, and the nodes with their lines beside it. An alias can stand for exponentially many
            # values or for itself, and a recipe needs none.
            depth = 0
            for event in yaml.parse(data, Loader=yaml.SafeLoader):
                depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
                if depth > _MOST_LEVELS:  # a parser in Python takes minutes for the brackets that fit into a file
                    raise KvcalError(f"{self.path}:{event.start_mark.line + 1}: lists in lists: not a recipe")
                if isinstance(event, yaml.AliasEvent):
                    raise KvcalError(
                        f"{self.path}:{event.start_mark.line + 1}: aliases (*) are not allowed in a recipe"
                    )
            loader = yaml.SafeLoader(data)
            node = loader.get_single_node()
            if node is None:
                raise KvcalError(f"{self.path}: is empty: give a recipe")
            return _Value(loader.construct_document(node), 1, node)
        except KvcalError:
            raise
        except Exception as error:  # nothing of ours runs inside, so it is the file's fault
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark else ""
            problem = getattr(error, "problem", None) or error or type(error).__name__
            raise KvcalError(f"{self.path}{line}: is not valid YAML ({problem})") from None

    def mapping(self, value: _Value | None, what: str, known: Collection[str] | None = None) -> dict[str, _Value]:
        """The entries of a mapping; {} for None. With `known`, no others."""
        if value is None:
            return {}
        if not isinstance(value.value, dict):
            raise KvcalError(f"{self.path}:{value.line}: {what}: expected lines of `name: value`")
        entries: dict[str, _Value] = {}
        for key_node, node in value.node.value:
            line = key_node.start_mark.line + 1
            name = key_node.value if isinstance(key_node.value, str) else ""
            if name in entries:
                raise KvcalError(f"{self.path}:{line}: {what}: {name} stands there twice")
            if known is not None and name not in known:
                raise KvcalError(f"{self.path}:{line}: {what}: {unknown(name, known)}")
            if name not in value.value:
                raise KvcalError(f"{self.path}:{line}: {what}: {name or 'a name'} is no plain text as a name")
            entries[name] = _Value(value.value[name], line, node)
        return entries

    def section(self, command: str, value: _Value | None, line: int) -> Section:
        if value is None or value.value is None:
            return Section(command, line=line)
        entries = self.mapping(value, command)
        settings = {name: entry.value for name, entry in entries.items()}
        return Section(command, settings, {name: entry.line for name, entry in entries.items()}, value.line)

    def stages(self, value: _Value | None, known: Collection[str]) -> list[Section]:
        if value is None:
            return []
        if not isinstance(value.value, list):
            raise KvcalError(f"{self.path}:{value.line}: stages: expected a list, of lines `- {next(iter(known))}: …`")
        found = []
        for item, node in zip(value.value, value.node.value, strict=True):
            line = node.start_mark.line + 1
            if isinstance(item, str):
                entries: dict[str, _Value] = {item: _Value(None, line, node)}
            else:
                entries = self.mapping(_Value(item, line, node), "stages")
            if len(entries) != 1:
                raise KvcalError(f"{self.path}:{line}: stages: one name in each item of the list, with its settings")
            for name, entry in entries.items():
                if name not in known:
                    raise KvcalError(f"{self.path}:{line}: stages: {unknown(name, known)}")
                found.append(self.section(name, entry, line))
        return found

    def texts(self, value: _Value, name: str) -> str | list[str]:
        if not isinstance(value.value, list) or not value.value:
            return self.text(value, name)
        return [self.text(_Value(item, value.line, value.node), name) for item in value.value]

    def text(self, value: _Value, name: str) -> str:
        if not isinstance(value.value, str) or not value.value.strip():
            raise KvcalError(f"{self.path}:{value.line}: {name}: expected text, not {_kind(value.value)}")
        return value.value


def unknown(name: str, known: Collection[str]) -> str:
    """What is wrong with a name that is none of `known`, and which one may be meant."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"no {name!r} there: " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}")


def _kind(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return "several values"
    return "nothing" if value in (None, "") else f"{value!r}"[:40]
