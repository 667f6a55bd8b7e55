"""The transformers model inside a wrapper."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..artifacts import KvcalError


def unwrapped(model: Any) -> Any:
    """The one transformers model in a module of PEFT, `torch.compile`, DataParallel or of the user's own.

    A model, or anything else with a `config` that holds no transformers model, is returned as it is.

    Raises:
        KvcalError: no model in it, or several.
    """
    if _is_model(model):
        return model
    found = _outermost(model) if isinstance(model, nn.Module) else []
    if len(found) == 1:
        return found[0]
    if not found and hasattr(model, "config"):
        return model
    inside = f"holds {len(found)} transformers models" if found else "is no transformers model and holds none"
    raise KvcalError(f"{type(model).__name__} {inside}: give a transformers model, or a module around one")


def _outermost(module: nn.Module) -> list[nn.Module]:
    """Models that lie in no other model, each once."""
    found: dict[nn.Module, None] = {}
    for child in module.children():
        found |= dict.fromkeys([child] if _is_model(child) else _outermost(child))
    return list(found)


def _is_model(module: Any) -> bool:
    """By name: this part of the runtime does not import transformers."""
    return any(
        kind.__name__ == "PreTrainedModel" and kind.__module__.partition(".")[0] == "transformers"
        for kind in type(module).__mro__
    )
