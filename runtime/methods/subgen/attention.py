"""Attention over exact tokens and a sketch of the others, under one softmax normaliser."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...attention import QUERY_BLOCK, SoftmaxSpec


def attention_with_sketch(
    query: Tensor, key: Tensor, value: Tensor, sketch: Mapping[str, Tensor], spec: SoftmaxSpec, limits: Tensor
) -> Tensor:
    """(Σ exact e^l v + sketched numerator) / (Σ exact e^l + sketched normaliser + e^{sink logit}).

    Args:
        query: [B, Hq, T, D]; key, value: [B, Hkv, S, D | Dv], held exactly.
        limits: [B, T] int64, how many of the S tokens, from the first, each query sees. All of the sketch is seen.

    Returns:
        [B, Hq, T, Dv]; zeros for a query that sees nothing.
    """
    parts = []
    for start in range(0, query.shape[2], QUERY_BLOCK):
        block = slice(start, start + QUERY_BLOCK)
        packed = query[:, :, block].unflatten(1, (key.shape[1], -1))
        exact = _dots(packed, key, spec)
        seen = torch.arange(key.shape[2], device=key.device) < limits[:, block].unsqueeze(-1)
        exact = exact.masked_fill(~seen[:, None, None], -torch.inf)
        sampled = {name: _sketched(packed, sketch, name, spec) for name in ("sample", "value_key") if name in sketch}
        highest = torch.cat((exact, *sampled.values()), -1).amax(-1, keepdim=True)
        if spec.sink_logits is not None:
            sink_logits = spec.sink_logits.float().view(1, *packed.shape[1:3], 1, 1)
            highest = torch.maximum(highest, sink_logits)
        highest = highest.clamp_min(torch.finfo(highest.dtype).min)
        weights = (exact - highest).exp()
        sampled = {name: (logits - highest).exp() for name, logits in sampled.items()}
        value_weights = sampled["value_key"]
        total = weights.sum(-1, keepdim=True)
        if "sample" in sampled:
            total = total + normaliser(sketch, sampled["sample"])
        else:
            total = total + normaliser_of_values(sketch, value_weights)
        if spec.sink_logits is not None:
            total = total + (sink_logits - highest).exp()
        out = _times(weights, value) + numerator(sketch, value_weights)
        parts.append((out / total.where(total > 0, 1.0)).flatten(1, 2).to(query.dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def normaliser(sketch: Mapping[str, Tensor], weights: Tensor) -> Tensor:
    """Σ_i (n_i / t) Σ_j w_ij, [B, H, G, T, 1]: estimates Σ e^l over all tokens of the sketch.

    Args:
        weights: [B, H, G, T, C·t], e^l of each cluster's samples.
    """
    share = sketch["count"].to(weights.dtype) / sketch["sample"].shape[3]
    per_sample = share.repeat_interleave(sketch["sample"].shape[3], -1)
    return _times(weights, per_sample.unsqueeze(-1))


def normaliser_of_values(sketch: Mapping[str, Tensor], weights: Tensor) -> Tensor:
    """Σ_j μ / (s ‖v_j‖²) w_j, [B, H, G, T, 1]: estimates the same from the numerator's samples.

    Tokens whose value is 0 are never sampled, so they are missing.

    Args:
        weights: [B, H, G, T, s], of each sampled token.
    """
    norm, share = _stands_for(sketch, weights.dtype)
    return _times(weights, share / norm)


def numerator(sketch: Mapping[str, Tensor], weights: Tensor) -> Tensor:
    """Σ_j μ / (s ‖v_j‖²) w_j v_j, [B, H, G, T, Dv]: estimates Σ e^l v over all tokens of the sketch.

    Args:
        weights: [B, H, G, T, s], e^l of each sampled token.
    """
    norm, share = _stands_for(sketch, weights.dtype)
    return _times(weights, sketch["value"].to(weights.dtype) / norm * share)


def _stands_for(sketch: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(‖v_j‖, μ / (s ‖v_j‖)), [B, H, s, 1] each. In two factors, since ‖v_j‖² may be less than float32 can hold."""
    norm = sketch["value"].to(dtype).norm(dim=-1, keepdim=True)
    norm = norm.where(norm > 0, 1.0)  # no slot is filled where the mass is 0
    return norm, sketch["mass"].to(dtype)[..., None, None] / (norm.shape[2] * norm)


def _sketched(packed: Tensor, sketch: Mapping[str, Tensor], name: str, spec: SoftmaxSpec) -> Tensor:
    """[B, H, G, T, n] logits of the samples `name`, -inf where there is none."""
    key = sketch[name]
    if name == "sample":
        filled = (sketch["count"] > 0).repeat_interleave(key.shape[3], -1)
        key = key.flatten(2, 3)
    else:
        filled = (sketch["mass"] > 0).unsqueeze(-1).expand(key.shape[:3])
    return _dots(packed, key, spec).masked_fill(~filled[:, :, None, None], -torch.inf)


def _dots(packed: Tensor, key: Tensor, spec: SoftmaxSpec) -> Tensor:
    """[B, H, G, T, D], [B, H, S, D] -> [B, H, G, T, S]; a group's queries are the rows of one matrix product."""
    return spec.logits((packed.flatten(2, 3).float() @ key.float().mT).unflatten(2, packed.shape[2:4]))


def _times(weights: Tensor, value: Tensor) -> Tensor:
    """[B, H, G, T, S], [B, H, S, D] -> [B, H, G, T, D]."""
    return (weights.flatten(2, 3) @ value.to(weights.dtype)).unflatten(2, weights.shape[2:4])
