"""Masks of transformers: which are needed at all, and what one says about padding."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...artifacts import KvcalError
from ..store import Store


def needed_only(build: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """The mask function `build`, but always None for one token that sees all before it.

    `build` gives None there too, but not while a CUDA graph is captured, which then makes the mask in every replay.
    """
    from transformers.masking_utils import causal_mask_function

    def mask(**asked: Any) -> Tensor | None:
        causal = asked["mask_function"] is causal_mask_function and asked.get("attention_mask") is None
        needless = causal and asked["q_length"] == 1 and asked.get("allow_is_causal_skip", True)
        return None if needless else build(**asked)

    return mask


class Padding:
    """Reads the mask of a forward call once, although every layer gets it."""

    def __init__(self) -> None:
        self._mask: weakref.ref[Tensor] | None = None
        self._valid: Tensor | None = None

    def of(self, mask: Tensor | None, store: Store, query: Tensor) -> Tensor | None:
        """Which of the T new tokens are no padding.

        Args:
            mask: [B or 1, 1, T, seen + T] bool, True where a query sees a key (or float, 0 there); None: no padding.
            store: of any layer, which holds the tokens seen so far.
            query: [B, Hq, T, D].

        Returns:
            [B, T] bool on the CPU; None when there is no padding among them.

        Raises:
            KvcalError: the mask hides more than padding and the future.
        """
        if mask is None:
            return None
        if self._mask is None or self._mask() is not mask:
            self._valid = _read(mask, store, query)
            self._mask = weakref.ref(mask)
        return self._valid


def _read(mask: Tensor, store: Store, query: Tensor) -> Tensor | None:
    (batch, _, tokens, _), seen = query.shape, store.seen
    if mask.shape[-2:] != (tokens, seen + tokens) or mask.shape[1] != 1:
        raise KvcalError(
            f"an attention mask of shape {list(mask.shape)} for {tokens} new tokens after {seen}: "
            "compressed caches take the usual 2D mask [batch, tokens so far]"
        )
    visible = (mask if mask.dtype == torch.bool else mask == 0)[:, 0]
    keys = visible[:, -1]  # the last query sees every key that is no padding
    hides = False
    if seen and len(store.lengths) == batch:  # else the store refuses the batch
        hidden = ~keys[:, :seen].cpu()
        hides = bool((hidden if store.valid is None else hidden & store.valid).any())
    if tokens > 1 and not hides:
        past = torch.ones(tokens, seen + tokens, dtype=torch.bool, device=mask.device).tril(seen)
        # What queries at padding see does not matter.
        hides = bool(((visible != (past & keys.unsqueeze(1))) & keys[:, seen:].unsqueeze(-1)).any())
    if hides:
        raise KvcalError("this attention mask differs from a causal one with padding: not supported with a cache")
    valid = keys[:, seen:].expand(batch, -1).cpu()
    return None if bool(valid.all()) else valid
