"""One pass over text for `fit_group`: what the attention of a group's layers is fed, and what tokens attend to."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...artifacts import KvcalError
from ...runtime.cla.sharing_map import SharingMap
from ...runtime.integration.routing import backbone
from ...runtime.wrapped import unwrapped
from ..blocks import TokenBlocks
from ..capture import LayerTensors, capture
from ..pre_rotary import PreRotary, find_rotation
from .attention_weights import AttentionWeights, weights_of
from .fitting import LayerMoments, fit_group

_QUERIES = 256
"""Whose attention is held at once."""


@torch.no_grad()
def fit_projections(
    model: Any,
    sharing_map: SharingMap,
    blocks: TokenBlocks,
    *,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Weights for `share(weights=…)`: what `fit_group` makes of every group's layers on this text.

    One forward pass, with the attention of every layer in a group computed once more. For hidden size E it holds
    E² float64 numbers for each of those layers: 80 MB for SmolLM2-135M, 4.3 GB for a 7B model.

    Args:
        model: in eval mode, left as found.
        blocks: as long as contexts to come, since what tokens attend to depends on it.
        progress: called with (blocks done, blocks in all).

    Raises:
        KvcalError: an architecture whose keys, values or outputs are not what `AttentionWeights` and `fit_group` take
            them for, or NaN or Inf in attention.
    """
    model = unwrapped(model)
    weights = weights_of(model, sharing_map)
    groups = {layer: group for group in sharing_map.shared for layer in group}
    has_rotary = bool(getattr(model.config.get_text_config(), "rope_parameters", None))
    attended = blocks.attended[:0]
    rotary_dims: dict[int, int] = {}
    inputs: dict[int, Tensor] = {}
    received: dict[int, Tensor] = {}
    cross: dict[int, Tensor] = {}
    queries: dict[int, Tensor] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = inspect.signature(module.forward).bind(*args, **kwargs)
        rotation = find_rotation(module, call, has_rotary)
        layer: int = module.layer_idx  # type: ignore[assignment]
        rotary_dims[layer] = 0 if rotation is None else rotation[0].shape[-1]
        inputs[layer] = weights[layer].inputs(next(iter(call.arguments.values())))

    def observe(seen: LayerTensors) -> None:
        if seen.layer not in groups:
            return
        group = groups[seen.layer]
        if seen.layer not in queries:
            _check(seen, inputs[seen.layer], weights[seen.layer], pre_rotary)
        received[seen.layer] = attention_received(seen.query_post, seen.key_post, attended, seen.scaling)
        queries[seen.layer] = queries.get(seen.layer, 0) + _second_moment(seen.query_pre, seen.key_pre, attended)
        if seen.layer == group[-1]:
            weight = torch.stack([received.pop(layer) for layer in group]).sum(0).unsqueeze(-1)
            storing = inputs[group[0]].flatten(0, 1)
            for layer in group:
                product = (inputs.pop(layer) * weight).flatten(0, 1).mT @ storing
                cross[layer] = cross.get(layer, 0) + product.double().cpu()

    pre_rotary = PreRotary()
    handles = [weights[layer].attention.register_forward_pre_hook(before, with_kwargs=True) for layer in groups]
    try:
        with capture(model, observe, pre_rotary):
            for start in range(0, len(blocks), batch_size):
                rows = slice(start, start + batch_size)
                attended = blocks.attended[rows].to(model.device)
                ids = blocks.ids[rows].long().to(model.device)
                backbone(model)(input_ids=ids, attention_mask=attended.long(), use_cache=False)
                if progress:
                    progress(min(rows.stop, len(blocks)), len(blocks))
    finally:
        for handle in handles:
            handle.remove()
    names = {module: name for name, module in model.named_modules()}
    made: dict[str, Tensor] = {}
    for group in sharing_map.shared:
        moments = [LayerMoments(cross[layer], queries[layer]) for layer in group]
        fitted = fit_group([weights[layer].matrices() for layer in group], moments, rotary_dims[group[0]])
        for number, layer in enumerate(group):
            changed = weights[layer].changed(fitted, number)
            made |= {f"{names[weights[layer].attention]}.{name}": tensor for name, tensor in changed.items()}
    return made


def _check(seen: LayerTensors, inputs: Tensor, weights: AttentionWeights, pre_rotary: PreRotary) -> None:
    """Raise KvcalError, at the first block, for what `fit_group` would take for something else."""
    if not all(torch.isfinite(tensor).all() for tensor in (seen.query_post, seen.key_post, seen.value, inputs)):
        raise KvcalError(f"layer {seen.layer}: NaN or Inf in its attention: load the model as float32 (--dtype)")
    if pre_rotary.methods[seen.layer] == "replay":
        raise KvcalError(
            f"layer {seen.layer}: its rotary embedding does not pair dimension i with i + half of them: "
            f"{AttentionWeights.INSTEAD}"
        )
    weights.check(inputs, seen)


def attention_received(query: Tensor, key: Tensor, attended: Tensor, scaling: float) -> Tensor:
    """[B, T]: the attention that each token receives, summed over queries, a mean over heads.

    Soft-capping and sink logits are left out.

    Args:
        query, key: [B, Hq, T, D] and [B, Hkv, T, D], after the rotary embedding.
        attended: [B, T] bool, False at padding, which follows the text.
    """
    batch, heads, tokens = query.shape[:3]
    grouped = query.unflatten(1, (key.shape[1], -1))  # [B, Hkv, G, T, D]
    received = torch.zeros(batch, tokens, device=query.device)
    for start in range(0, tokens, _QUERIES):
        block = grouped[:, :, :, start : start + _QUERIES]
        end = start + block.shape[3]
        scores = (block.float() * scaling) @ key[:, :, None, :end].mT.float()
        future = torch.arange(end, device=query.device) > torch.arange(start, end, device=query.device).unsqueeze(1)
        weights = scores.masked_fill_(future, float("-inf")).softmax(-1)
        weights *= attended[:, None, None, start:end, None]
        received[:, :end] += weights.sum((1, 2, 3)) / heads
    return received


def _second_moment(query: Tensor, key: Tensor, attended: Tensor) -> Tensor:
    """[Hkv, D, D] float64: Σ q qᵀ over the text's tokens and the heads of each KV head."""
    grouped = query.unflatten(1, (key.shape[1], -1)) * attended[:, None, None, :, None]
    rows = grouped.permute(1, 0, 2, 3, 4).flatten(1, 3).float()
    return (rows.mT @ rows).double().cpu()
