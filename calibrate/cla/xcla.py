"""The stage `xcla`: groups of neighbouring layers keep their tokens in common coefficients of few bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...artifacts import Artifact, KvcalError, Layer, Stage
from ...runtime.cla.group_code import BITS, KINDS, STAGE, code_bytes, earlier_layers
from ...runtime.cla.sharing_map import SharingMap
from ..clustering import one_thread
from ..reservoir import sampled_tokens
from .group_fit import Fit
from .group_sample import GroupSample
from .pairs import can_share

GROUP, MEMORY = 3, 0.2
"""By default: layers of a group; bytes of codes over those of 16-bit keys and values."""
_ROUNDS = 14
"""Halvings of the interval of levels, of 10⁻¹⁰ to 10 by their logarithm."""
_CLOSE = 0.995
"""Of the budget: codes that take so much of it are taken at once."""
_FEWEST_TOKENS = 32


def xcla(
    artifact: Artifact,
    *,
    angles: Tensor,
    group: int = GROUP,
    memory: float = MEMORY,
    progress: Callable[[int, int], None] | None = None,
) -> Artifact:
    """Fit the codes of every layer with full attention to the reservoir, and add the stage `xcla`.

    Args:
        angles: of the rotary embedding, from `angles_of`.
        group: layers of a full group; 1: each layer by itself.
        memory: bytes of all codes, at most, over those of 16-bit keys and values. What layers, keys and values get of
            them follows from what it saves there (`group_fit`).
        progress: called with (rounds done, rounds in all).

    Returns:
        The artifact with the stage; `kvcal.artifacts.save` writes it.

    Raises:
        KvcalError: settings that no codes have, or an artifact without a reservoir to fit them to.
    """
    if isinstance(memory, bool) or not 0 < memory <= 1:
        raise KvcalError(f"memory {memory}: give a fraction above 0, of at most 1")
    groups = groups_of(artifact, group)
    sampled = [GroupSample(artifact, layers, angles) for layers in groups]
    full = sum(_full(layer) for layers in groups for layer in layers)

    def fitted(level: float) -> tuple[dict[int, dict[str, Fit]], float]:
        found = {layer: fits for group in sampled for layer, fits in group.fit(level).items()}
        size = sum(
            len(fit.code.offset) * code_bytes(fit.code.counts) for fits in found.values() for fit in fits.values()
        )
        return found, size / full

    least, most = -10.0, 1.0
    with one_thread():
        best, share = fitted(float("inf"))
        if share > memory:
            raise KvcalError(f"memory {memory}: the least that codes take here is {share:.3f}: give at least as much")
        for done in range(_ROUNDS):
            if progress:
                progress(done, _ROUNDS)
            if share > _CLOSE * memory:
                break
            middle = (least + most) / 2
            found, taken = fitted(10**middle)
            if taken <= memory:
                best, share, most = found, taken, middle
            else:
                least = middle
    if progress:
        progress(_ROUNDS, _ROUNDS)
    tensors = {"angles": angles.clone()}
    for layers in groups:
        indices = [layer.index for layer in layers]
        for index in indices:
            tensors |= {f"layers.{index}.{name}": tensor for name, tensor in _tensors(best[index]).items()}
            tensors[f"layers.{index}.earlier"] = torch.tensor([other for other in indices if other < index]).long()
    return artifact.with_stage(STAGE, Stage(tensors, {"group": group, "memory": memory}))


def groups_of(artifact: Artifact, group: int) -> list[list[Layer]]:
    """Layers with full attention, each `group` neighbours that are alike together.

    Raises:
        KvcalError: there is nothing to fit, or to fit to.
    """
    if type(group) is not int or group < 1:
        raise KvcalError(f"group {group}: give at least 1 layer")
    artifact.require("reservoir", "moments")
    tokens = sampled_tokens(artifact)
    if tokens < _FEWEST_TOKENS:
        raise KvcalError(
            f"{artifact.name}: a reservoir of {tokens} tokens, codes are fitted to at least {_FEWEST_TOKENS}: "
            "calibrate again with `calibrate pca`"
        )
    if not artifact.full_layers:
        raise KvcalError(f"{artifact.name}: all layers have a sliding window: there is nothing to code")
    groups: list[list[Layer]] = []
    for layer in artifact.full_layers:
        if groups and len(groups[-1]) < group and can_share(groups[-1][0], layer):
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return groups


def xcla_report(artifact: Artifact) -> dict[str, Any]:
    """What the stage `xcla` holds.

    Returns:
        {"settings", "groups": as in the stage `cla`, "memory": bytes of all codes over those of 16-bit keys and values,
        "read": bytes that a step reads of a token over the same, "bytes_per_token": {"before", "after"}, "layers":
        [{"layer", "earlier", "memory", and of "key" and "value" {"bits": {bits: coefficients}, "told", "lost": shares
        of their variance}}]}
    """
    rows: list[dict[str, Any]] = []
    sizes: dict[int, int] = {}
    for layer in artifact.layers_in(STAGE):
        earlier = earlier_layers(artifact, layer.index)
        counts = {kind: artifact.tensor(STAGE, layer.index, f"{kind}.counts").tolist() for kind in KINDS}
        sizes[layer.index] = layer.kv_heads * sum(map(code_bytes, counts.values()))
        told, lost = (artifact.tensor(STAGE, layer.index, name).tolist() for name in ("told", "lost"))
        rows.append(
            {
                "layer": layer.index,
                "earlier": earlier,
                "memory": sizes[layer.index] / _full(layer),
                **{
                    kind: {
                        "bits": dict(zip(map(str, BITS), counts[kind], strict=True)),
                        "told": told[at],
                        "lost": lost[at],
                    }
                    for at, kind in enumerate(KINDS)
                },
            }
        )
    followed = {index for row in rows for index in row["earlier"]}
    before = sum(map(_full, artifact.layers_in(STAGE)))
    read = sum(sizes[index] for row in rows for index in (*row["earlier"], row["layer"]))
    return {
        "settings": dict(artifact.stages[STAGE].settings),
        "groups": str(
            SharingMap(tuple((*row["earlier"], row["layer"]) for row in rows if row["layer"] not in followed))
        ),
        "memory": sum(sizes.values()) / before,
        "read": read / before,
        "bytes_per_token": {"before": before, "after": sum(sizes.values())},
        "layers": rows,
    }


def _full(layer: Layer) -> int:
    """Bytes of a token's keys and values in 16 bits."""
    return layer.kv_heads * 2 * (layer.head_dim + layer.value_dim)


def _tensors(fits: Mapping[str, Fit]) -> dict[str, Tensor]:
    tensors = {
        "told": torch.tensor([fits[kind].told for kind in KINDS], dtype=torch.float64),
        "lost": torch.tensor([fits[kind].lost for kind in KINDS], dtype=torch.float64),
    }
    for kind, fit in fits.items():
        parts = {"offset": fit.code.offset, "basis": fit.code.basis, "back": fit.code.back}
        tensors |= {f"{kind}.{name}": tensor.contiguous() for name, tensor in parts.items()}
        tensors[f"{kind}.counts"] = torch.tensor(fit.code.counts)
    return tensors
