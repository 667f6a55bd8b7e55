"""The context that a model states, and the length of the blocks that it is calibrated on."""

from __future__ import annotations

from typing import Any

from ...artifacts import KvcalError
from ...runtime.integration.rotation import rotations


def max_context(config: Any) -> int | None:
    """The model's context in tokens, or None when its config states none."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    stated = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return stated if stated and stated > 0 else None  # XLNet says -1


LONGEST_BLOCK = 8192
"""Tokens of a block, where nobody says how many. Bases of rotated keys hold only at the positions that they were
fitted to; but among twice as many tokens attention takes twice the time for each."""


def default_seq_len(model: Any) -> int:
    """Tokens of a block: the model's context, shorter where its rotary embedding changes before, 8192 at most."""
    stated = [max_context(model.config), *(rotation.original for rotation in rotations(model))]
    return min([LONGEST_BLOCK, *(length for length in stated if length is not None)])


def check_seq_len(seq_len: int, config: Any) -> None:
    """Raise KvcalError when blocks of `seq_len` tokens exceed the model's context."""
    context = max_context(config)
    if context is not None and seq_len > context:
        raise KvcalError(
            f"blocks of {seq_len} tokens exceed this model's context of {context}: give --seq-len {context}"
        )
