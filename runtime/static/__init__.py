"""Steps of fixed shapes and addresses over the buffers of a store, which a CUDA graph can replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..methods.base import Method as PolicyMethod
from ..stores import Method, Store
from ..stores.clusterkv import ClusterKV
from ..stores.loki import Loki
from .clock import Clock
from .clusterkv import ClusterKVStep
from .loki import LokiStep
from .paged import PagedStep
from .step import Step

STEPS: dict[type, Callable[[Any, Clock], Step]] = {
    Loki: LokiStep,
    ClusterKV: ClusterKVStep,
}


def make_step(method: Method, store: Store, clock: Clock) -> Step:
    """Of a method that has no `refusal`."""
    return (PagedStep if isinstance(method, PolicyMethod) else STEPS[type(method)])(store, clock)


def refusal(method: Method) -> str | None:
    """Why a method has no such step; None: it has one."""
    if not isinstance(method, PolicyMethod) and type(method) not in STEPS:
        return f"{type(method).__name__} has no step of fixed shapes"
    if getattr(method, "tail", False) and getattr(method, "choice", "exact") != "exact":
        return "a tail beside a threshold has no step of fixed shapes"
    if getattr(method, "offload", "none") != "none":
        return "an offloaded cache copies what the step selects"
    if getattr(method, "record_mass", False):
        return "record_mass has no step of fixed shapes"
    return None


__all__ = ["Clock", "Step", "make_step", "refusal"]
