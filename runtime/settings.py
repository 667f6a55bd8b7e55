"""Turns what a user writes into one method per layer.

Any setting, and the method itself, may be one value for all layers, a list with one entry per layer, or
a mapping from layers to values: `{"0-1": "full", "2-": "loki"}`. In a mapping of methods a value may also be a
mapping of its own: `{"0-1": "full", "2-": {"method": "loki", "rank": 0.5}}`.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ..artifacts import Artifact, KvcalError
from .cla.group_store import GroupStore
from .evicting_store import EvictingStore
from .methods import METHODS, Method
from .methods.base import Policy
from .methods.evicting import EvictingPolicy
from .store import Store

DEFAULT_METHOD = "loki"


def methods_by_layer(
    method: Any, settings: Mapping[str, Any], layers: Sequence[int], total: int, keys_are_shared: bool = False
) -> dict[int, Method]:
    """The method of each of `layers`, those with full attention among the model's `total`.

    Args:
        keys_are_shared: by layers (`cla`): methods with a basis take "pca" where none is named, since the score basis
            is fitted to the queries of one layer.

    Raises:
        KvcalError: unknown method, parameter or layer; a layer without a value or with two.
    """
    if not layers and total:  # nothing will be compressed, but what was asked for is checked all the same
        methods_by_layer(method, settings, range(total), total, keys_are_shared)
        return {}
    settings = dict(settings)
    dense_layers = settings.pop("dense_layers", 0)
    if isinstance(dense_layers, bool) or not isinstance(dense_layers, int) or not 0 <= dense_layers <= total:
        raise KvcalError(f"dense_layers {dense_layers!r}: give a whole number from 0 to {total}, this model's layers")
    methods = by_layer("method", method, layers, total)
    values = {name: by_layer(name, value, layers, total) for name, value in settings.items()}
    chosen: dict[int, Method] = {}
    used: set[str] = set()
    for layer in layers:
        own = methods[layer]
        own = dict(own) if isinstance(own, Mapping) else {"method": own}
        name = own.pop("method", DEFAULT_METHOD)
        known = _parameters(name)
        shared = {key: values[key][layer] for key in values if key in known}
        used |= shared.keys()
        for key in own:
            if key not in known:
                raise _unknown(key, name, known)
        if layer < dense_layers:
            name, shared, own = "full", {}, {}
        elif keys_are_shared:
            shared = {**METHODS[name].shared_defaults, **shared}
        chosen[layer] = METHODS[name](**{**shared, **own})
    for name in values:
        if name not in used:
            names = sorted({name_of(used_method) for used_method in chosen.values()})
            raise _unknown(name, ", ".join(names), sorted({key for each in names for key in _parameters(each)}))
    return chosen


def builders(
    chosen: Mapping[int, Method], head_dims: Sequence[int], artifact: Artifact | None
) -> dict[int, Callable[[], Store]]:
    """For each layer a function that makes an empty store. Parameters and the artifact's tensors are checked here.

    Raises:
        KvcalError: names the layer.
    """
    made: dict[int, Callable[[], Store]] = {}
    for layer, method in chosen.items():
        try:
            policy = method.bind(layer, head_dims[layer], artifact)
            for other in policy.earlier:
                if chosen.get(other) != method:
                    raise KvcalError(
                        f"its tokens are kept relative to those of layer {other}: give that the same method and "
                        "settings (with dense_layers, whole groups)"
                    )
            made[layer] = partial(new_store, policy)
        except KvcalError as error:
            raise type(error)(f"{name_of(method)}, layer {layer}: {error}") from None
    return made


def new_store(policy: Policy) -> Store:
    """An empty store of the kind that the policy needs."""
    if isinstance(policy, EvictingPolicy):
        return EvictingStore(policy)
    return GroupStore(policy) if policy.grouped else Store(policy)


def by_layer(name: str, value: Any, layers: Sequence[int], total: int) -> dict[int, Any]:
    """One value per layer, from a single value, a list over all layers or a mapping of layer ranges."""
    if isinstance(value, (list, tuple)):
        if len(value) != total:
            raise KvcalError(f"{name}: a list of {len(value)} values for a model of {total} layers: give one per layer")
        return {layer: value[layer] for layer in layers}
    of_one_method = name == "method" and isinstance(value, Mapping) and not any(map(_is_range, value))
    if of_one_method or not isinstance(value, Mapping):
        return dict.fromkeys(layers, value)
    found: dict[int, Any] = {}
    for key, entry in value.items():
        for layer in _layers_of(name, str(key), total):
            if layer in found:
                raise KvcalError(
                    f"{name}: layer {layer} has two values (the second by {key!r}): let ranges not overlap"
                )
            found[layer] = entry
    missing = [layer for layer in layers if layer not in found]
    if missing:
        raise KvcalError(f"{name}: no value for layers {missing}: cover all, e.g. with {{'{missing[0]}-': …}}")
    return {layer: found[layer] for layer in layers}


def describe(chosen: Mapping[int, Method]) -> list[dict[str, Any]]:
    """[{"layers": "0-3", "method": "loki", "rank": 0.25, …}, …]: neighbouring layers that are alike as one."""
    runs: list[tuple[int, int, Method]] = []
    for layer, method in sorted(chosen.items()):
        if runs and runs[-1][2] == method and runs[-1][1] == layer - 1:
            runs[-1] = (runs[-1][0], layer, method)
        else:
            runs.append((layer, layer, method))
    return [
        {"layers": f"{first}-{last}", "method": name_of(method), **dataclasses.asdict(method)}
        for first, last, method in runs
    ]


def _is_range(key: Any) -> bool:
    return re.fullmatch(r"\d+(-\d*)?", str(key)) is not None


def _layers_of(name: str, key: str, total: int) -> range:
    if not _is_range(key):
        raise KvcalError(f"{name}: layers {key!r}: give them as '3', '0-1' or '2-'")
    first, dash, last = key.partition("-")
    start, stop = int(first), int(last) if last else (total - 1 if dash else int(first))
    if not start <= stop < total:
        raise KvcalError(f"{name}: layers {key!r}: this model has layers 0 to {total - 1}")
    return range(start, stop + 1)


def _parameters(method: Any) -> list[str]:
    if isinstance(method, str) and method.partition("+")[0] == "cla":
        raise KvcalError(
            f"{method} changes the model, all of its layers: compress(model, artifact, method={method!r}); a cache of "
            f"one's own takes the method after the +, within shared() or that compress()"
        )
    if not isinstance(method, str) or method not in METHODS:
        near = difflib.get_close_matches(str(method), METHODS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise KvcalError(f"unknown method {method!r}: {hint}there are {', '.join(METHODS)}, and cla+ any of them")
    return [field.name for field in dataclasses.fields(METHODS[method])]


def _unknown(name: str, methods: str, known: Sequence[str]) -> KvcalError:
    return KvcalError(f"{methods} has no parameter {name!r}: there are {', '.join(known) or 'none'}, and dense_layers")


def name_of(method: Method) -> str:
    """A method's name in METHODS."""
    return next(name for name, kind in METHODS.items() if type(method) is kind)
