"""Refuse a `generate()` that would go wrong later, before it decodes: forward calls are not told what is to follow."""

from __future__ import annotations

import inspect
import types
import weakref
from typing import Any

from transformers.generation.utils import GenerationMode

from ...artifacts import KvcalError
from .layer import Call
from .rotation import Rotation, refuse_change
from .routing import kind

_METHOD = "_prepare_cache_for_generation"
"""generate() calls it once, with what it is about to do."""
_COMPUTE_ANEW = ("phi3", "phimoe", "phi4_multimodal")
"""Models that drop their cache in generate() where the rotation changes, and then, unless transformers is too old to
give them the whole text again, compute all keys anew."""


class GenerationCheck:
    """Replaces a model's `_prepare_cache_for_generation`, and calls it after its checks."""

    def __init__(self, model: Any, rotations: list[Rotation], tells_guesses: bool):
        self._model, self._rotations, self._tells_guesses = weakref.ref(model), rotations, tells_guesses

    @classmethod
    def install(cls, model: Any, rotations: list[Rotation]) -> GenerationCheck | None:
        """None: the model needs no check."""
        tells = "logits_to_keep" in inspect.signature(model.forward).parameters
        if (tells and not rotations) or not hasattr(model, _METHOD) or _METHOD in vars(model):
            return None
        made = vars(model)[_METHOD] = cls(model, rotations, tells)
        return made

    def remove(self, model: Any) -> None:
        if vars(model).get(_METHOD) is self:
            del vars(model)[_METHOD]

    # Copies and pickles of the model have its own method.

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        model = self._model()
        return types.MethodType(getattr(type(model), _METHOD), memo[id(model)])

    def __reduce__(self) -> Any:
        return getattr, (self._model(), _METHOD)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self._model()
        method = types.MethodType(getattr(type(model), _METHOD), model)
        given = inspect.signature(method).bind(*args, **kwargs).arguments
        if given["generation_config"].use_cache is not False:
            self._check(model, given)
        return method(*args, **kwargs)

    def _check(self, model: Any, given: dict[str, Any]) -> None:
        from .attachment import attached

        attachment, past = attached(model), given["model_kwargs"].get("past_key_values")
        ours = isinstance(getattr(past, "call", None), Call)
        compressed = (
            attachment is not None
            and attachment.compressed is not None
            and attachment.compressed.entry.includes_caller()
        )
        if not ours and not compressed:
            return
        guesses = given["generation_mode"] == GenerationMode.ASSISTED_GENERATION
        if guesses and not self._tells_guesses:
            raise KvcalError(
                f"{kind(model)}: forward() does not name logits_to_keep, by which generate() tells guesses from a "
                "prompt: leave out assisted decoding and prompt lookup, or name it there"
            )
        self._check_lengths(model, given, past if ours else None, guesses)

    def _check_lengths(self, model: Any, given: dict[str, Any], past: Any, guesses: bool) -> None:
        config, mask = given["generation_config"], given["model_kwargs"].get("attention_mask")
        width = getattr(config, "_mask_length", None) if mask is None else mask.shape[1]  # no mask: nothing is padding
        if width is None:
            return
        real = width if mask is None else int(mask.sum(1).max())
        begins = past is None or not past.get_seq_length()
        first = min(config.prefill_chunk_size or real, real) if begins else past.call.length
        last = max(first, real + given["max_cache_length"] - width)
        if guesses:
            last += config.prompt_lookup_num_tokens or 0  # which may go beyond what is asked for
        drops = model.config.model_type in _COMPUTE_ANEW and hasattr(model.config, "original_max_position_embeddings")
        if drops and past is not None and begins and any(first > rotation.original for rotation in self._rotations):
            raise KvcalError(
                f"{kind(model)}: generate() leaves out a cache that it is given for a prompt of {first} tokens: use "
                "compress(), or decode()"
            )
        # Exempt where no one is left with the dropped cache: one that the user gave would stay behind, and guesses
        # would be taken back from it; and such a model counts padding, too.
        anew = drops and "next_sequence_length" in type(model).prepare_inputs_for_generation.__code__.co_consts
        if anew and past is None and not guesses and first == real == width:
            return
        refuse_change(self._rotations, model, first, last)
