"""Rotary embeddings that depend on how many tokens there are: longrope (Phi-3-128k) and dynamic NTK.

Beyond the original length all keys are to be rotated otherwise, those that a cache holds, too. So a cache is right on
one side of that length only; `generate(use_cache=False)` is right on both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ...artifacts import KvcalError
from .routing import backbone, kind


@dataclass(frozen=True)
class Rotation:
    """A rotary embedding that depends on the number of tokens."""

    kind: str
    original: int
    """Tokens up to which the embedding does not change."""
    module: nn.Module | None = None

    def changes(self, first: int, last: int) -> bool:
        """Whether keys that were rotated in a call of `first` tokens so far are wrong in one of `last`."""
        first, last = (length + self._is_stretched(length) for length in (first, last))
        if self.kind == "longrope":
            return (first > self.original) != (last > self.original)
        return first != last and max(first, last) > self.original  # each token more is another rotation

    def _is_stretched(self, length: int) -> bool:
        """A dynamic embedding that has seen a longer text stays as it was then, at exactly its original length."""
        cached = getattr(self.module, "max_seq_len_cached", self.original)
        return self.kind == "dynamic" and length == self.original and int(cached) > self.original


def rotations(model: Any) -> list[Rotation]:
    """A model's rotary embeddings that depend on the number of tokens; [] for nearly all models."""
    config = model.config.get_text_config()
    found = []
    for module in backbone(model).modules():
        types = getattr(module, "rope_type", None)
        for layers, name in types.items() if isinstance(types, dict) else [(None, types)]:
            given = _parameters(config, layers)
            if isinstance(name, str) and (original := _original(name, given, config)) is not None:
                found.append(Rotation("longrope" if name == "longrope" else "dynamic", original, module))
    if not found:  # modules of a model's own code, that only the config tells of
        given = _parameters(config, None)
        name = str(given.get("rope_type", given.get("type")))
        if (original := _original(name, given, config)) is not None:
            found.append(Rotation("longrope" if name in ("longrope", "su") else "dynamic", original))
    return found


def check_lengths(model: Any, first: int, last: int) -> None:
    """
    Args:
        first: tokens of a sequence in the first call with a cache.
        last: tokens of it in the last call.

    Raises:
        KvcalError: the rotary embedding would change between them.
    """
    refuse_change(rotations(model), model, first, last)


def refuse_change(found: list[Rotation], model: Any, first: int, last: int) -> None:
    for rotation in found:
        if rotation.changes(first, last):
            name = "dynamic NTK" if rotation.kind == "dynamic" else rotation.kind
            or_begin = f", begin with a prompt of more than {rotation.original}" if name == "longrope" else ""
            raise KvcalError(
                f"{kind(model)}: its rotary embedding ({name}) changes beyond {rotation.original} tokens, and cached "
                f"keys would keep that of {first} tokens when there are {last}: stay within {rotation.original} tokens"
                f"{or_begin}, or call generate(use_cache=False)"
            )


def _parameters(config: Any, layers: str | None) -> dict[str, Any]:
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    parameters = given.get(layers, given) if layers is not None else given
    return parameters if isinstance(parameters, dict) else {}


def _original(name: str, given: dict[str, Any], config: Any) -> int | None:
    """`Rotation.original`; None: the rotation does not depend on the number of tokens."""
    if name in ("longrope", "su"):
        inherited = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
        return int(given.get("original_max_position_embeddings") or inherited)
    return int(config.max_position_embeddings) if "dynamic" in name else None
