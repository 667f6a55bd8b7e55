"""The rotary embedding of a model at the positions of a reservoir, so that its keys can be seen before it."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from ...artifacts import Artifact, KvcalError
from ...runtime.integration.routing import backbone
from ..pre_rotary import Rotation, find_rotation, rotate_back

_TURNS_ALIKE = 0.05
"""Allowed error of a cosine, which bfloat16 rounds by 0.004."""


def rotation_of(artifact: Artifact, model: Any) -> Rotation | None:
    """cos and sin [N, R] of the full-attention layers at the reservoir's positions; None where there is no rotation."""
    rotation = block_rotation(artifact, model)
    if rotation is None:
        return None
    artifact.require("reservoir")
    position = artifact.stages["reservoir"].tensors["position"]
    return rotation[0][position], rotation[1][position]


def angles_of(artifact: Artifact, model: Any) -> Tensor:
    """[R / 2] float64, by how much one position turns each plane; none where no layer can be turned back.

    Raises:
        KvcalError: the planes do not turn by the same angle at every position.
    """
    unrotated = any(layer.pre_rotary == "unrotate" for layer in artifact.full_layers)
    rotation = block_rotation(artifact, model) if unrotated else None
    if rotation is None:
        return torch.zeros(0, dtype=torch.float64)
    cos, sin = (part[:, : part.shape[-1] // 2].double() for part in rotation)
    angles, position = cos.new_zeros(cos.shape[-1]), 1
    while position < len(cos):  # in bfloat16 one position tells an angle up to 0.004 only, the n-th up to 0.004 / n
        turn = torch.atan2(sin[position], cos[position])
        whole = torch.round((position * angles - turn) / (2 * math.pi)) if position > 1 else 0
        angles, position = (turn + 2 * math.pi * whole) / position, 2 * position
    turned = torch.arange(len(cos)).unsqueeze(1) * angles
    size = (cos.square() + sin.square()).sqrt()
    off = (turned.cos() * size - cos).abs().max()
    if not off <= _TURNS_ALIKE * size.max():
        raise KvcalError(
            f"{artifact.model.id}: its rotary embedding does not turn by the same angle at every position: keys cannot "
            "be seen before it"
        )
    return angles


@torch.no_grad()
def block_rotation(artifact: Artifact, model: Any) -> Rotation | None:
    """cos and sin [seq_len, R] of the full-attention layers at the positions of a block; None: there is no rotation.

    The model is run over one block of its first token, as long as those of the calibration, up to the first such
    layer: what it hands there does not depend on the tokens.
    """
    layers = [layer.index for layer in artifact.layers if layer.window is None]
    if not layers or all(artifact.layers[layer].pre_rotary == "none" for layer in layers):
        return None

    from ...runtime.integration.support import find_attention  # loads transformers

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Seen(find_rotation(module, inspect.signature(module.forward).bind(*args, **kwargs), expected=True))

    handle = find_attention(model)[layers[0]].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        ids = torch.zeros(1, artifact.data["seq_len"], dtype=torch.int64, device=model.device)
        backbone(model)(input_ids=ids, use_cache=False)
    except _Seen as seen:
        if seen.rotation is None:
            return None
        cos, sin = (part.expand(1, -1, -1)[0].cpu().float() for part in seen.rotation)
        return cos, sin
    finally:
        handle.remove()
    return None


def unrotate(keys: Tensor, rotation: Rotation) -> Tensor:
    """Keys [H, N, D] as they were before their rotary embedding (of the half-split convention)."""
    cos, sin = rotation
    return rotate_back(keys.unsqueeze(0), cos.unsqueeze(0), sin.unsqueeze(0))[0]


def rotate(keys: Tensor, rotation: Rotation) -> Tensor:
    """The inverse of `unrotate`, which divides by cos² + sin²: it gets the conjugate, divided so that this cancels."""
    cos, sin = rotation
    length = cos**2 + sin**2
    return unrotate(keys, (cos / length, -sin / length))


class _Seen(Exception):
    def __init__(self, rotation: Rotation | None):
        self.rotation = rotation
