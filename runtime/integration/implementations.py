"""Which attention implementation the config of a model names, for a time one of ours.

transformers looks its attention function up by the name in the config; no forward is overridden. Several models may
have one config, so what it named before is kept by config, and restored when the last model is left.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...artifacts import KvcalError

# Not "…sdpa…" nor "…flash…": transformers takes other branches for names that contain those.
PREFIX = "kvcal_"
LOCK = threading.RLock()  # reentrant: a dropped cache may be collected, and close its route, at any point


class Implementation(str):
    """A name of ours that knows the one it stands for, which is what copies and pickles of a config get."""

    original: str

    def __new__(cls, name: str, original: str) -> Implementation:
        made = super().__new__(cls, name)
        made.original = original
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> str:
        return self.original

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (self.original,)


@dataclass
class _Routed:
    config: Any
    before: str | None
    routes: list[Route]
    """The open ones, the last of which is in force."""


_ROUTED: dict[int, _Routed] = {}
"""By the id of the config."""


class Route:
    """From `open()` until `close()`, the configs of a model and its parts name an implementation of ours.

    Args:
        name: gives our name for the one that a config had before.
    """

    def __init__(self, model: Any, name: Callable[[str], str]):
        parts = [module for module in model.modules() if hasattr(module, "set_attn_implementation")]
        self.name = name
        self._configs = list({id(part.config): part.config for part in parts}.values())

    def open(self) -> Route:
        with LOCK:
            for config in self._configs:
                routed = _ROUTED.setdefault(id(config), _Routed(config, stood_for(_now(config)), []))
                routed.routes.append(self)
                _name(routed)
        return self

    def close(self) -> None:
        with LOCK:
            for config in self._configs:
                routed = _ROUTED[id(config)]
                routed.routes.remove(self)
                if _is_ours(_now(config)):  # else the user has chosen another meanwhile
                    _name(routed)
                if not routed.routes:
                    del _ROUTED[id(config)]

    def renew(self) -> None:
        """Replace an implementation that was chosen since as well, which `close` then restores."""
        with LOCK:
            for config in self._configs:
                routed = _ROUTED[id(config)]
                if not _is_ours(_now(config)):
                    routed.before = _now(config)
                    _name(routed)

    def replaced_by(self) -> str | None:
        """The implementation that was chosen since, in the place of ours; None: ours is in force."""
        return next((str(now) for now in map(_now, self._configs) if not _is_ours(now)), None)


def implementation(model: Any) -> str:
    """The attention implementation that the model's config names now, or did before a route was opened."""
    return stood_for(_now(model.config.get_text_config())) or "eager"


def stood_for(name: str | None) -> str | None:
    """The implementation that a name of ours stands for; any other name unchanged."""
    if isinstance(name, Implementation):
        return name.original
    return "sdpa" if _is_ours(name) else name


def is_routed(model: Any) -> bool:
    return id(model.config.get_text_config()) in _ROUTED


def refuse_captured(model: Any) -> None:
    """Raises KvcalError while `routed` takes all attention calls of a model, or of another with its config."""
    now = _now(model.config.get_text_config())
    if is_routed(model) and now is not None and now.removeprefix(PREFIX).isdigit():
        raise KvcalError("this model is already being captured: leave the other context first")


def _name(routed: _Routed) -> None:
    name = routed.before
    if routed.routes:
        before = routed.before or "eager"
        name = Implementation(routed.routes[-1].name(before), before)
    routed.config._attn_implementation_internal = name


def _is_ours(name: str | None) -> bool:
    return name is not None and name.startswith(PREFIX)


def _now(config: Any) -> str | None:
    name: str | None = config._attn_implementation_internal
    return name


def delegate(implementation: str, module: nn.Module) -> Callable[..., Any]:
    """The function that computes `module`'s attention under an implementation's name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get(implementation, eager)
