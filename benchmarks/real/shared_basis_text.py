"""What the model loses of text and answers where a cache holds one basis for a group of layers, or fewer bits.

The same simulation as in `shared_basis`: keys and values of a dense prefill are replaced by what comes back from their
codes, and the model decodes from them with dense attention. What it decodes is kept as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcal.calibrate.cla.rotation import rotate, unrotate
from kvcal.calibrate.evaluation.grid import FULL
from kvcal.calibrate.evaluation.measurements import Batch, Measured, batches
from kvcal.calibrate.evaluation.prefilled import DECODED, PrefilledWindows, prefill
from kvcal.calibrate.evaluation.prompts import Prompts
from kvcal.calibrate.evaluation.rows import result_row

from .shared_basis import GRADED, HALF, OWN_BITS, SHORT, Code, Group, Reservoir, held, named, rotations
from .subjects import Bench

Kept = dict[int, tuple[Tensor, Tensor]]
"""By layer, [1, Hkv, T, D] keys before their rotary embedding, and values."""


@dataclass(frozen=True)
class Way:
    """How keys and values are held."""

    size: int | None
    """Layers of a group; None: each layer's own, less their means."""
    code: Code

    @property
    def name(self) -> str:
        return f"{self.size}: {named(self.code)}"

    def bytes(self, dims: int) -> float:
        return held(self.code, (self.size or 1) * dims)

    def through(self, kept: Kept, samples: Mapping[int, Reservoir], groups: Mapping[tuple[int, ...], Group]) -> Kept:
        if self.size is None:
            ((_, bits),) = self.code
            return {layer: samples[layer].through(*own, bits) for layer, own in kept.items()}
        found: Kept = {}
        for layers, group in groups.items():
            keys, values = zip(*(kept[layer] for layer in layers), strict=True)
            found |= dict(zip(layers, group.through(keys, values, self.code), strict=True))
        return found


WAYS = (
    *(Way(None, ((1, bits),)) for bits in OWN_BITS),
    *(Way(size, HALF) for size in (2, 5)),
    *(Way(size, code) for code in (GRADED, SHORT) for size in (1, 3)),
)
"""8, 4 and 2 bits of each layer's own; half of the coefficients of a group; all in graded bits, and fewer of them."""
DENSE = "full"


@torch.no_grad()
def shared_basis_text(bench: Bench, prompts: Prompts, once: Callable[[str, Callable[[], Any]], None]) -> None:
    """Of every batch, by `DENSE` and the name of each way, what was measured; see `rows`.

    Args:
        once: called with the key of a batch and what measures it.
    """
    artifact, model = bench.in_short_blocks(), bench.loaded.model
    layers = [layer.index for layer in artifact.layers if layer.window is None]
    at_sample, at_row = rotations(artifact, model, prompts.longest_context)
    samples = {layer: Reservoir(artifact, layer, at_sample) for layer in layers}
    groups: dict[int | None, dict[tuple[int, ...], Group]] = {None: {}}
    for size in sorted({way.size for way in WAYS if way.size}):
        assert len(layers) % size == 0, f"{len(layers)} layers are no groups of {size}"
        of_size = [tuple(layers[at : at + size]) for at in range(0, len(layers), size)]
        groups[size] = {group: Group([samples[layer] for layer in group]) for group in of_size}

    def measured(batch: Batch) -> dict[str, Any]:
        prefilled = prefill(model, prompts, batch, bench.loaded.tokenizer, DECODED, {})
        cache = prefilled.cache if isinstance(prefilled, PrefilledWindows) else prefilled.contexts[0]
        views = {layer: [store.tokens[name].view for name in ("key", "value")] for layer, store in cache.stores.items()}
        tokens = next(iter(views.values()))[0].shape[2]
        at = tuple(part[:tokens] for part in at_row)
        kept = {layer: (unrotate(key[0], at)[None], value.clone()) for layer, (key, value) in views.items()}
        found = {DENSE: prefilled.measure(None, FULL, _ignored).as_json()}
        # Every `measure` begins with a copy of the prefilled cache: what is written there is decoded from.
        for way in WAYS:
            for layer, (key, value) in way.through(kept, samples, groups[way.size]).items():
                views[layer][0].copy_(rotate(key[0], at)[None])
                views[layer][1].copy_(value)
            found[way.name] = prefilled.measure(None, FULL, _ignored).as_json()
        return found

    for batch in work(prompts):
        once(batch.key, lambda batch=batch: measured(batch))  # type: ignore[misc]


def rows(prompts: Prompts, found: Mapping[str, Mapping[str, Any]], layers: int, dims: int) -> list[dict[str, Any]]:
    """`full` and a row for each of WAYS, as of an evaluation; "size", "code" and "bytes" as in `shared_basis`.

    Args:
        found: by batch, what `shared_basis_text` measured.
    """

    def row(name: str, full: Mapping[str, Any] | None) -> dict[str, Any]:
        measured = {key: Measured(**by_way[name]) for key, by_way in found.items()}
        return result_row(FULL, measured, prompts, work(prompts), layers, full)

    full = row(DENSE, None)
    return [
        full,
        *({**row(way.name, full), "size": way.size, "code": named(way.code), "bytes": way.bytes(dims)} for way in WAYS),
    ]


def work(prompts: Prompts) -> list[Batch]:
    """One row at a time: no padding moves its positions."""
    return batches(prompts, 1)


def _ignored() -> None:
    """Nothing is said of a step."""
