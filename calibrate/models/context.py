"""The context that a model states."""

from __future__ import annotations

from typing import Any

from ...artifacts import KvcalError


def max_context(config: Any) -> int | None:
    """The model's context in tokens, or None when its config states none."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    stated = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return stated if stated and stated > 0 else None  # XLNet says -1


def check_seq_len(seq_len: int, config: Any, option: str = "--seq-len") -> None:
    """Raise KvcalError, naming the option, when blocks of `seq_len` tokens exceed the model's context."""
    context = max_context(config)
    if context is not None and seq_len > context:
        raise KvcalError(
            f"blocks of {seq_len} tokens exceed this model's context of {context}: give {option} {context}"
        )
