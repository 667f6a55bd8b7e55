"""The arguments of a model's forward call, by name or by position, as a forward pre-hook sees them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Arguments:
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    names: tuple[str, ...]
    """Names of the positional parameters, at least of those in `args`; () where they are unknown."""

    @classmethod
    def of(cls, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        return cls(args, kwargs, positions(module) if args else ())

    @property
    def known(self) -> bool:
        return len(self.args) <= len(self.names)

    def get(self, name: str) -> Any:
        """The argument of this name; None: not given."""
        if name in self.names[: len(self.args)]:
            return self.args[self.names.index(name)]
        return self.kwargs.get(name)

    def replaced(self, **values: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) with other values, each where it was given, else by name."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for name, value in values.items():
            if name in self.names[: len(args)]:
                args[self.names.index(name)] = value
            else:
                kwargs[name] = value
        return tuple(args), kwargs


def positions(module: nn.Module) -> tuple[str, ...]:
    """The names of forward's positional parameters.

    A forward of `*args` usually hands them on to the class that it overrides: the names are those of the first forward
    without `*args`.
    """
    inherited = [vars(kind)["forward"] for kind in type(module).__mro__ if "forward" in vars(kind)]
    candidates = [(module.forward, 0), *((forward, 1) for forward in inherited)]  # functions of a class take self, too
    for forward, skipped in candidates:
        parameters = list(inspect.signature(forward).parameters.values())[skipped:]
        if all(parameter.kind is not inspect.Parameter.VAR_POSITIONAL for parameter in parameters):
            by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            return tuple(parameter.name for parameter in parameters if parameter.kind in by_position)
    return ()
