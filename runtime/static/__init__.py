"""Steps of fixed shapes and addresses over the buffers of a store, which a CUDA graph can replay."""

from __future__ import annotations

from ..methods.base import Method as PolicyMethod
from ..stores import Method
from .clock import Clock
from .paged import PagedStep

__all__ = ["Clock", "PagedStep", "refusal"]


def refusal(method: Method) -> str | None:
    """Why a method has no such step; None: it has one."""
    if not isinstance(method, PolicyMethod):
        return f"{type(method).__name__} has no step of fixed shapes"
    return method.not_captured()
