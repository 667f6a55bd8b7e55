"""SubGen stores of a small shape, as its tests make them."""

from __future__ import annotations

from typing import Any

from sequences import Geometry, Row, Step, decode, prefill

from kvcal.runtime.attention import SoftmaxSpec
from kvcal.runtime.methods.subgen import SubGen
from kvcal.runtime.settings import new_store
from kvcal.runtime.store import Store

GEOMETRY = Geometry(16, 8, 2, 3)
SPEC = SoftmaxSpec(GEOMETRY.scaling)
SMALL: dict[str, Any] = {"window": 6, "sinks": 2, "clusters": 5, "t": 2, "s": 7, "normaliser": "clusters"}
PROMPTS = (9, 40, 1, 33)
CLOSE = {"rtol": 1e-3, "atol": 1e-4}
"""float32 against float64 where numerators cancel."""


def make(**settings: Any) -> Store:
    return new_store(SubGen(**{**SMALL, **settings}).bind(0, GEOMETRY.dim, None))


def alone(row: Row, spec: SoftmaxSpec = SPEC, **settings: Any) -> list[Step]:
    store = make(**settings)
    prefill(store, [row], spec)
    return decode(store, [row], spec)[0]
