"""The plan of an artifact, layer by layer: which settings, what they read, what they lose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...artifacts import Artifact, ArtifactError
from ...runtime.planned import has_plan, read_plan
from ..plots import short_name
from .numbers import number


@dataclass(frozen=True)
class Planned:
    """One layer of a plan."""

    layer: int
    method: str
    settings: str
    bytes: float | None
    """Read per step, as a share of what dense attention reads in all planned layers; None: not stated."""
    error: float | None
    """Of the attention output, relative."""


@dataclass(frozen=True)
class Plan:
    layers: tuple[Planned, ...]
    budget: str
    ratio: float | None
    """Perplexity over `full`'s, as the plan's check measured it."""
    warnings: tuple[str, ...]


def plan(artifact: Artifact) -> Plan | None:
    """None: the artifact has no plan.

    Raises:
        KvcalError: it has one that cannot be read.
    """
    if not has_plan(artifact):
        return None
    body = read_plan(artifact)
    layers = [
        _planned(layer, setting, body) for layer, setting in enumerate(body["layers"]) if isinstance(setting, Mapping)
    ]
    if (planned := len(body["layers"])) != len(artifact.layers):
        raise ArtifactError(
            f"{artifact.name}: plan.json has {planned} layers, the artifact {len(artifact.layers)}: make it with "
            "`calibrate plan ARTIFACT --model MODEL --data DATA`"
        )
    budget = _mapping(body.get("budget"))
    warnings = body.get("warnings")
    return Plan(
        tuple(layers),
        short_name(", ".join(f"{name} {value}" for name, value in budget.items())),
        number(_mapping(body.get("measured")).get("perplexity_ratio")),
        tuple(f"The plan's check: {short_name(each)}." for each in (warnings if isinstance(warnings, list) else [])),
    )


def _planned(layer: int, setting: Mapping[str, Any], body: Mapping[str, Any]) -> Planned:
    offers = _mapping(body.get("offers")).get(str(layer))
    offers = [_mapping(offer) for offer in offers] if isinstance(offers, list) else []
    chosen: Mapping[str, Any] = next((offer for offer in offers if offer.get("setting") == setting), {})
    stated = {name: value for name, value in setting.items() if name != "method"}
    return Planned(
        layer,
        short_name(setting.get("method")),
        short_name(", ".join(f"{name} {value}" for name, value in stated.items()), 300),
        number(chosen.get("bytes")),
        number(chosen.get("error")),
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
