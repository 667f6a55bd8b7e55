"""What the model loses of text and answers where a cache holds one basis for a group of layers, or fewer bits.

The same simulation as in `shared_basis`: keys and values of a dense prefill are replaced by what comes back from their
codes, and the model decodes from them with dense attention. What it decodes is kept as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from shared_basis import GRADED, HALF, SHORT, Code, Group, Reservoir, held, named, rotations
from torch import Tensor

from kvcal.artifacts import Artifact
from kvcal.calibrate.cla.rotation import rotate, unrotate
from kvcal.calibrate.evaluation.measurements import batches
from kvcal.calibrate.evaluation.prefilled import DECODED, prefill
from kvcal.calibrate.evaluation.prompts import Prompts
from kvcal.calibrate.evaluation.rows import result_row

FULL = {"method": "full"}
Kept = dict[int, tuple[Tensor, Tensor]]
"""By layer, [1, Hkv, T, D] keys before their rotary embedding, and values."""


@dataclass(frozen=True)
class Held:
    """How keys and values are held. A name of `shared_basis`'s table."""

    size: int | None
    """Layers of a group; None: each layer's own, less their means."""
    code: Code

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


CANDIDATES = (
    *(Held(None, ((1, bits),)) for bits in (8, 4, 2)),
    *(Held(size, HALF) for size in (2, 5)),
    *(Held(size, code) for code in (GRADED, SHORT) for size in (1, 3)),
)
"""8, 4 and 2 bits of each layer's own; half of the coefficients of a group; all in graded bits, and fewer of them."""


@torch.no_grad()
def shared_basis_text(prompts: Prompts, artifact: Artifact, loaded: Any) -> list[dict[str, Any]]:
    """`full` and a row for each of CANDIDATES, as of an evaluation; "size", "code" and "bytes" as in `shared_basis`."""
    model, work = loaded.model, batches(prompts, 1)  # one row at a time: no padding moves its positions
    layers = [layer.index for layer in artifact.layers if layer.window is None]
    at_sample, at_row = rotations(artifact, model, prompts.longest_context)
    samples = {layer: Reservoir(artifact, layer, at_sample) for layer in layers}
    groups = {
        size: {
            tuple(layers[at : at + size]): Group([samples[layer] for layer in layers[at : at + size]])
            for at in range(0, len(layers), size)
        }
        for size in {way.size for way in CANDIDATES if way.size}
    }
    measured: dict[Held | None, dict[str, Any]] = {way: {} for way in (None, *CANDIDATES)}
    for batch in work:
        print(f"shared-basis-text: {batch.key} of {len(work)}", flush=True)
        prefilled = prefill(model, prompts, batch, loaded.tokenizer, DECODED, {})
        cache = prefilled.cache if batch.key.startswith("perplexity") else prefilled.contexts[0]
        views = {layer: [store.tokens[name].view for name in ("key", "value")] for layer, store in cache.stores.items()}
        tokens = next(iter(views.values()))[0].shape[2]
        at = tuple(part[:tokens] for part in at_row)
        kept = {layer: (unrotate(key[0], at)[None], value.clone()) for layer, (key, value) in views.items()}
        for way in measured:
            back = way.through(kept, samples, groups.get(way.size, {})) if way else {}
            for layer, (key, value) in back.items():
                views[layer][0].copy_(rotate(key[0], at)[None])
                views[layer][1].copy_(value)
            measured[way][batch.key] = prefilled.measure(None, FULL, lambda: None)
    rows: list[dict[str, Any]] = []
    for way, found in measured.items():
        row = result_row(FULL, found, prompts, work, len(layers), rows[0] if rows else None)
        dims = samples[layers[0]].key.shape[2]
        named_as = {"size": way.size, "code": named(way.code), "bytes": way.bytes(dims)} if way else {}
        rows.append({**row, **named_as})
    return rows
