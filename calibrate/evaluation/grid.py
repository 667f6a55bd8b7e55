"""The settings to evaluate: the product of lists of parameters, for the methods that have them."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ...artifacts import Artifact, KvcalError
from ...runtime import METHODS  # the rest of it imports transformers, and settings are also read without a model
from ...runtime.cla.method import Cla, split_method
from ...runtime.planned import NAME as PLAN

Value = bool | int | float | str | None
Setting = dict[str, Any]
"""{"method": name, parameter: value, …}: the keyword arguments of `compress`."""

FULL: Setting = {"method": "full"}
_SHOWN = ("rank", "keep")
"""Stated in every setting, also where the default is meant: tables and figures tell settings apart by them."""
_OF_ALL = ("dense_layers",)
"""Arguments of `compress` that mean the same for every method but `full`."""


def parse_value(text: str) -> Value:
    """ "32" is a count, "0.25" and "1.0" are fractions, "true" is a flag, "None" is none, all else ("variance:0.9")
    a word."""
    flags = {"true": True, "false": False}
    if text == "None":
        return None
    if text.lower() in flags:
        return flags[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse_values(text: str) -> list[Value]:
    """A comma list of `parse_value`.

    Raises:
        KvcalError: an empty entry.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise KvcalError(f"{text!r}: an empty entry in a list: give values separated by commas, e.g. 0.25,0.125")
    return [parse_value(part) for part in parts]


def parse_assignments(texts: Iterable[str]) -> dict[str, list[Value]]:
    """name=value[,value…] strings as {name: values}.

    Raises:
        KvcalError: of another form, or a name twice.
    """
    found: dict[str, list[Value]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip()
        if not equals or not name:
            raise KvcalError(f"--set {text}: give a name and a value, e.g. --set basis=score")
        if name in found:
            raise KvcalError(f"--set {name}: given twice: give one comma list, e.g. --set {name}=A,B")
        found[name] = parse_values(values)
    return found


def make_grid(methods: Sequence[str], parameters: Mapping[str, Sequence[Value]]) -> list[Setting]:
    """`full` first, then every method with every combination of those parameters that it has.

    Raises:
        KvcalError: an unknown method, or a parameter that none of the methods has.
    """
    known_methods = (*METHODS, PLAN)
    unknown = next((method for method in methods if split_method(method, {})[1] not in known_methods), None)
    if unknown is not None or not methods:
        near = difflib.get_close_matches(str(unknown), METHODS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise KvcalError(f"no method {unknown!r}: {hint}choose among {', '.join(METHODS)}, and cla or cla+ any of them")
    fields = {method: _fields(method) for method in methods}
    for name in parameters:
        if not any(name in of_method for of_method in fields.values()):
            known = sorted({field for of_method in fields.values() for field in of_method})
            have = f"they have {', '.join(known)}" if known else "they have none"
            raise KvcalError(f"no parameter {name!r} in {', '.join(methods)}: {have}")
    grid = [FULL]
    for method in methods:
        defaults = fields[method]
        names = [name for name in (*_SHOWN, *parameters) if name in defaults]
        lists = {name: list(parameters.get(name, [defaults[name]])) for name in names}
        for values in itertools.product(*lists.values()):
            setting = {"method": method, **dict(zip(lists, values, strict=True))}
            if key_of(setting) not in map(key_of, grid):  # a count of 1 is not a fraction of 1.0
                grid.append(setting)
    return grid


def check_grid(grid: Iterable[Setting], model: Any, artifact: Artifact | None) -> None:
    """Build every setting's cache, so that what cannot work is said before a token is run.

    Raises:
        KvcalError: for the first setting that cannot work.
    """
    from ...runtime import CompressedCache

    for settings in by_sharing(grid):
        with sharing(model, artifact, settings[0]):
            for setting in settings:
                CompressedCache(model, artifact, **decoding(setting))


def recorded(settings: Iterable[Setting], model: Any, artifact: Artifact | None, layers: int) -> dict[str, list[Any]]:
    """Settings of `full`, by layer, that record all that these settings start from beside keys and values: the
    attention that each token receives (h2o), and the last queries (snapkv). To be called inside `sharing`."""
    from ...runtime import CompressedCache

    mass, queries = [False] * layers, [0] * layers
    for setting in settings:
        for layer, store in CompressedCache(model, artifact, **decoding(setting)).stores.items():
            mass[layer] = mass[layer] or store.accumulates
            queries[layer] = max(queries[layer], store.observes)
    return {"record_mass": mass, "record_queries": queries}


def by_sharing(grid: Iterable[Setting]) -> list[list[Setting]]:
    """Settings in groups that decode with the same model; the group of the unchanged model first, if there is one."""
    groups: dict[str, list[Setting]] = {}
    for setting in grid:
        cla, _, _ = _split(setting)
        groups.setdefault("" if cla is None else repr(cla), []).append(setting)
    return [groups[key] for key in sorted(groups, key=bool)]


@contextmanager
def sharing(model: Any, artifact: Artifact | None, setting: Setting) -> Iterator[None]:
    """Inside, layers of the model share keys and values as the setting says; without `cla` the model is unchanged."""
    parameters = {name: value for name, value in setting.items() if name != "method"}
    from ...runtime.integration.contexts import shared_for

    with shared_for(model, artifact, setting["method"], parameters):
        yield


def decoding(setting: Setting) -> Setting:
    """The part of a setting that a cache takes: {"method": "cla+loki", "groups": "0-1,2-3", "rank": 32} decodes with
    {"method": "loki", "rank": 32}."""
    _, method, parameters = _split(setting)
    return {"method": method, **parameters}


def has_rotated_basis(setting: Setting) -> bool:
    """Whether a setting decodes with tensors that were fitted to rotated keys, or may do so (`plan`)."""
    _, decoder, parameters = _split(setting)
    return decoder in (PLAN, "spectral") or ("basis" in _fields(setting["method"]) and parameters.get("stage") != "pre")


def describe(setting: Setting) -> str:
    """Parameters for people: "rank 0.25 keep 0.125"."""
    return " ".join(f"{name} {value}" for name, value in setting.items() if name != "method")


def key_of(setting: Setting) -> str:
    """Equal for equal settings, whatever their order."""
    return json.dumps(setting, sort_keys=True)


def _split(setting: Setting) -> tuple[Cla | None, str, Setting]:
    return split_method(setting["method"], {name: value for name, value in setting.items() if name != "method"})


def _fields(method: str) -> dict[str, Any]:
    """Parameters of a method and their defaults."""
    cla, decoder, _ = split_method(method, {})
    if decoder == PLAN:
        return {}
    kinds = [METHODS[decoder], *([Cla] if cla else [])]
    found: dict[str, Any] = {field.name: field.default for kind in kinds for field in dataclasses.fields(kind)}
    return found if decoder == "full" else found | dict.fromkeys(_OF_ALL)
