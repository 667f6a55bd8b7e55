"""A small generate loop: dense prefill, then the whole decode step, captured once and replayed.

Its attention writes and reads a compressed cache at fixed addresses; it samples on the device and leaves the next token
where the next replay finds it. The host waits for nothing but, now and then, whether all rows have ended.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..artifacts import Artifact, KvcalError
from ..artifacts.shown import Shown
from ..kernels import backend
from .methods.amounts import check_count
from .replay import Replay, State
from .sampling import Sampler
from .typed import DecodeSettings, MethodArgument
from .wrapped import unwrapped

if TYPE_CHECKING:
    from typing_extensions import Unpack


WITHOUT_NUMBA = (
    "numba is not installed: on this CPU attention runs in torch, which takes longer where much is held: "
    "pip install 'kvcal[cpu]'"
)
CHECK_EVERY = 16
"""Steps between two looks at whether all rows have ended."""


@dataclass(frozen=True, repr=False)
class Decoded(Shown):
    tokens: Tensor
    """[B, prompt + new] int64; after a row's end of sequence, padding."""
    why_not_captured: str | None
    """Why the steps were not replays of a CUDA graph; None: they were."""
    cache: Any
    """The CompressedCache, which holds all tokens but the last: give it to the next turn (of a model that shares keys
    and values as then, where the method was a `cla`)."""

    def facts(self) -> dict[str, str]:
        captured = self.why_not_captured or "in a CUDA graph"
        return {"tokens": str(list(self.tokens.shape)), "captured": captured, "cache": repr(self.cache)}


@torch.no_grad()
def decode(
    model: Any,
    input_ids: Tensor,
    artifact: Artifact | None = None,
    method: MethodArgument = None,
    *,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    sampler: Sampler | None = None,
    seed: int = 0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    graph: bool = True,
    **settings: Unpack[DecodeSettings],
) -> Decoded:
    """Continue prompts as `generate()` does with the same cache.

    Args:
        model: a transformers decoder with a language-model head, in eval mode, or a module around one, which is called.
        input_ids: [B, T] int64.
        attention_mask: [B, T], 0 where `input_ids` is left-padded; None: nowhere.
        method: as of `compress`.
        settings: as of `compress`.
        max_new_tokens: of each row, fewer where it ends before.
        sampler: None: greedy.
        seed: of the sampler.
        eos_token_id: ends a row; None: as the model's generation config says.
        pad_token_id: follows it; None: as the config says, or the first token that ends a row.
        graph: False: run every step from Python.

    Raises:
        KvcalError: whatever does not fit, before any token is decoded.
    """
    from .integration.contexts import shared_for
    from .integration.rotation import check_lengths

    check_count("max_new_tokens", max_new_tokens, 1)
    inside = unwrapped(model)
    mask = _mask(input_ids, attention_mask)
    _check_ids(inside, input_ids)
    _refuse_training(inside)
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise KvcalError("this model puts a learned prompt before every call: use generate() within compress()")
    if sampler is not None and not isinstance(sampler, Sampler):
        raise KvcalError(f"sampler {sampler!r}: give a Sampler, e.g. Sampler(temperature=0.7, top_p=0.9)")
    ends, padding = _specials(inside, eos_token_id, pad_token_id, input_ids.device)
    position = (mask.cumsum(1) - 1).clamp_min(0)
    longest = int(mask.sum(1).max())
    check_lengths(inside, longest, longest + max_new_tokens - 1)
    state = State(position[:, -1:] + 1, max_new_tokens, sampler or Sampler(), ends, padding, seed)
    with shared_for(model, artifact, method, settings) as (inner, own):
        return _decode(model, input_ids, mask, position, state, graph, (artifact, inner, own))


def _decode(
    model: Any, input_ids: Tensor, mask: Tensor, position: Tensor, state: State, graph: bool, arguments: Any
) -> Decoded:
    """
    Args:
        arguments: (artifact, method, settings) of the cache.
    """
    from .integration.cache import CompressedCache
    from .integration.stepping import SteppingCache
    from .integration.support import takes_positions

    artifact, method, settings = arguments
    cache = CompressedCache(model, artifact, method, **settings)
    in_numba = any(bound.in_numba for bound in cache.blueprint.methods.values())
    if in_numba and input_ids.device.type == "cpu" and not backend.has_numba():
        warnings.warn(WITHOUT_NUMBA, stacklevel=3)
    # As generate() does: a model that does not name them counts them by what its cache holds.
    positions = {"position_ids": position} if takes_positions(model) else {}
    out = model(input_ids=input_ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1, **positions)
    state.take(out.logits[:, -1])
    why_not = SteppingCache.refusal(cache)
    if why_not is None:
        done, why_not = _replayed(model, SteppingCache(cache), state, graph)
    else:
        done = _one_by_one(model, cache, state, mask, bool(positions))
    new = state.tokens[:, : _length(state, done)]
    if new.shape[1] < done:
        cache.crop(new.shape[1] - done)
    return Decoded(torch.cat((input_ids, new), 1), why_not, cache)


def _check_ids(model: Any, input_ids: Tensor) -> None:
    """A GPU would end the process at one that the model has no embedding for."""
    count = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if count is not None and bool((wrong := (input_ids < 0) | (input_ids >= count)).any()):
        found = int(input_ids[wrong][0])
        raise KvcalError(f"input_ids has {found}, this model's tokens are 0 to {count - 1}: use its own tokenizer")


def _mask(input_ids: Tensor, given: Tensor | None) -> Tensor:
    """[B, T] int64, 0 at the padding on the left."""
    if not isinstance(input_ids, Tensor):
        raise KvcalError(f"input_ids: a {type(input_ids).__name__}: give a tensor, as tokenizer(…).input_ids is")
    if input_ids.dim() != 2 or not input_ids.numel():
        raise KvcalError(f"input_ids {list(input_ids.shape)}: give [rows, tokens], at least one of each")
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise KvcalError(f"input_ids of {input_ids.dtype}: give the numbers of tokens, as int64")
    if given is None:
        return torch.ones_like(input_ids)
    if given.shape != input_ids.shape:
        raise KvcalError(f"attention_mask {list(given.shape)}: give one number per token, {list(input_ids.shape)}")
    mask = given.to(input_ids.device).ne(0).long()
    if not bool((mask == given.to(mask.device)).all()):
        raise KvcalError("attention_mask has numbers other than 0 and 1: give 0 at padding and 1 at tokens")
    wrong = (mask[:, 1:] < mask[:, :-1]).any(1) | (mask[:, -1] == 0)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise KvcalError(
            f"attention_mask, row {row}: padding follows or parts its tokens: pad prompts on the left, "
            'tokenizer.padding_side = "left"'
        )
    return mask


def _refuse_training(model: Any) -> None:
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        part = f" ({training})" if training else ""
        raise KvcalError(
            f"{type(model).__name__} is in training mode{part}, which draws dropout and may leave out the cache: "
            "call model.eval() before decode()"
        )


def _replayed(model: Any, stepping: Any, state: State, graph: bool) -> tuple[int, str | None]:
    """(tokens sampled, why no graph was captured)."""

    def step() -> None:
        out = model(
            input_ids=state.ids,
            position_ids=state.position,
            past_key_values=stepping,
            use_cache=True,
            logits_to_keep=1,
        )
        state.position += 1
        stepping.clock.tick()
        state.take(out.logits[:, -1])

    replay = Replay(step, stepping.changed, state, graph, stepping.clock.reset)
    stepping.captured = replay.why_not is None
    done = 1
    every = CHECK_EVERY if stepping.can_go_back else 1
    while not _finished(state, done, every):
        replay(stepping.prepare())
        stepping.unsettled += 1
        done += 1
    stepping.finish()
    return done, replay.why_not


def _one_by_one(model: Any, cache: Any, state: State, mask: Tensor, positions: bool) -> int:
    """Tokens sampled, by plain calls with the compressed cache.

    Args:
        positions: the model takes position ids.
    """
    done = 1
    while not _finished(state, done, every=1):
        mask = torch.cat((mask, mask.new_ones(mask.shape[0], 1)), 1)
        given = {"position_ids": state.position} if positions else {}
        out = model(input_ids=state.ids, attention_mask=mask, past_key_values=cache, use_cache=True, **given)
        state.position += 1
        state.take(out.logits[:, -1])
        done += 1
    return done


def _finished(state: State, done: int, every: int) -> bool:
    """Waits for the device every few steps only."""
    if done >= state.tokens.shape[1]:
        return True
    return state.ends is not None and done % every == 1 % every and bool(state.ended.all())


def _length(state: State, done: int) -> int:
    """Tokens until the last row has ended: there may have been steps after it."""
    if state.ends is None:
        return done
    ended = torch.isin(state.tokens[:, :done], state.ends).cumsum(1) > 0
    return min(done, int((~ended).sum(1).max()) + 1)


def _specials(model: Any, ends: Any, padding: int | None, device: torch.device) -> tuple[Tensor | None, int]:
    """([n] tokens that end a row, the token after them)."""
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None) if ends is None else ends
    listed = [ends] if isinstance(ends, int) else list(ends or [])
    if any(isinstance(token, bool) or not isinstance(token, int) for token in listed):
        raise KvcalError(f"eos_token_id {ends!r}: give a token id, or several")
    padding = getattr(config, "pad_token_id", None) if padding is None else padding
    padding = next(iter(listed), 0) if padding is None else padding
    return torch.tensor(listed, device=device) if listed else None, padding
