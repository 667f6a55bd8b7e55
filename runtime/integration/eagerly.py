"""Functions that work on a cache, whatever mode its caller is in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def eagerly(function: F) -> F:
    """Run it, called by position, outside of torch.compile, without gradients and outside of inference mode: a cache
    outlives its caller's mode, and is written in place.

    Most callers decode under `torch.no_grad()`. For them nothing is switched, as switching takes longer than much of
    what a step does in a layer.
    """
    switched = torch.compiler.disable(torch.inference_mode(False)(torch.no_grad()(function)))

    @functools.wraps(function)
    def run(*operands: Any) -> Any:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return switched(*operands)
        return function(*operands)

    return run  # type: ignore[return-value]
