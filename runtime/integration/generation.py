"""Refuse a `generate()` whose tokens would outgrow the rotary embedding of its cached keys, before it decodes."""

from __future__ import annotations

import inspect
import types
import weakref
from typing import Any

from transformers.generation.utils import GenerationMode

from .layer import Call
from .rotation import Rotation, refuse_change

_METHOD = "_prepare_cache_for_generation"
"""generate() calls it once, with what it is about to do; a forward call is not told how many are to follow."""
_COMPUTE_ANEW = ("phi3", "phimoe", "phi4_multimodal")
"""Models that drop their cache in generate(), and compute all keys anew, where the rotation changes."""


class LengthCheck:
    """In the place of a model's `_prepare_cache_for_generation`, which it calls."""

    def __init__(self, model: Any, found: list[Rotation]):
        self._model, self._rotations = weakref.ref(model), found

    @classmethod
    def install(cls, model: Any, found: list[Rotation]) -> LengthCheck | None:
        """None: the model needs no check."""
        if not found or not hasattr(model, _METHOD) or _METHOD in vars(model):
            return None
        made = vars(model)[_METHOD] = cls(model, found)
        return made

    def remove(self, model: Any) -> None:
        if vars(model).get(_METHOD) is self:
            del vars(model)[_METHOD]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        model = self._model()
        return types.MethodType(getattr(type(model), _METHOD), memo[id(model)])

    def __reduce__(self) -> Any:
        model = self._model()
        return types.MethodType, (getattr(type(model), _METHOD), model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self._model()
        method = types.MethodType(getattr(type(model), _METHOD), model)
        self._check(model, inspect.signature(method).bind(*args, **kwargs).arguments)
        return method(*args, **kwargs)

    def _check(self, model: Any, given: dict[str, Any]) -> None:
        from .attachment import attached

        config, inputs = given["generation_config"], given["model_kwargs"]
        past, mask = inputs.get("past_key_values"), inputs.get("attention_mask")
        found, ours = attached(model), isinstance(getattr(past, "call", None), Call)
        compressed = found is not None and found.compressed is not None and found.compressed.entry.includes_caller()
        width = getattr(config, "_mask_length", None) if mask is None else mask.shape[1]  # no mask: nothing is padding
        if config.use_cache is False or width is None or not (ours or compressed):
            return
        real = width if mask is None else int(mask.sum(1).max())
        chunk = config.prefill_chunk_size or real
        first = past.call.length if ours and past.get_seq_length() else min(chunk, real)
        last = max(first, real + given["max_cache_length"] - width)
        if (
            not ours
            and first == real == width
            and model.config.model_type in _COMPUTE_ANEW
            and hasattr(model.config, "original_max_position_embeddings")
            and given["generation_mode"] != GenerationMode.ASSISTED_GENERATION  # which takes guesses back
            and all(rotation.kind == "longrope" for rotation in self._rotations)
        ):
            return
        refuse_change(self._rotations, model, first, last)
