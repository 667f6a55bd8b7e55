"""Queries and keys as they were before the rotary embedding, for any architecture.

Replaying the attention module with an identity rotation (cos = 1, sin = 0) is exact everywhere but
pays for the QKV projection twice. Rotating back is nearly free but wrong for conventions other than
the common one. So both are done on a run's first batch, per layer, and rotating back is used for the
rest where it agreed.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from ..artifacts import KvcalError
from ..runtime.integration.routing import UNSUPPORTED

# Rotating back rounds a few times in float32; a wrong convention is off by the size of the vector itself.
_AGREEMENT = {torch.float32: 1e-5, torch.float64: 1e-12}
_AGREEMENT_LOW_PRECISION_EPS = 8

Rotation = tuple[Tensor, Tensor]


class PreRotary:
    """Remembers per layer how pre-rotary tensors are obtained: "unrotate", "replay" or "none"."""

    def __init__(self, methods: dict[int, str] | None = None):
        self.methods = dict(methods or {})

    def needs_replay(self, layer: int) -> bool:
        return self.methods.get(layer, "replay") == "replay"

    def resolve(
        self, layer: int, query: Tensor, key: Tensor, rotation: Rotation | None, replayed: Rotation | None
    ) -> tuple[Tensor, Tensor]:
        """(query_pre, key_pre) from the post-rotary pair and, where it was made, the replayed one."""
        if rotation is None:
            self.methods[layer] = "none"
            return query, key
        if layer not in self.methods:
            self.methods[layer] = "unrotate" if _agrees(query, key, rotation, replayed) else "replay"
        if self.methods[layer] == "replay":
            if replayed is None:
                raise RuntimeError(f"layer {layer}: nothing was replayed")
            return replayed
        return rotate_back(query, *rotation), rotate_back(key, *rotation)


def find_rotation(module: nn.Module, call: inspect.BoundArguments, expected: bool) -> Rotation | None:
    """The (cos, sin) that an attention module is called with; None in models without a rotary embedding.

    Raises:
        KvcalError: there should be one and it does not come in this form.
    """
    given = {**call.arguments, **call.kwargs}.get("position_embeddings")
    if given is None and not expected:
        return None
    if isinstance(given, (tuple, list)) and len(given) == 2:
        cos, sin = given
        if isinstance(cos, Tensor) and isinstance(sin, Tensor) and cos.is_floating_point():
            return cos, sin
    raise KvcalError(f"{type(module).__name__}: its rotary embedding is not passed as (cos, sin): {UNSUPPORTED}")


def replay_without_rotation(module: nn.Module, call: inspect.BoundArguments) -> None:
    """Run `module` as it is called, but with the identity as its rotation and without the cache."""
    kwargs = dict(zip(inspect.signature(module.forward).parameters, call.args, strict=False)) | call.kwargs
    cos, sin = kwargs["position_embeddings"]
    kwargs["position_embeddings"] = (torch.ones_like(cos), torch.zeros_like(sin))
    # The real call that follows appends to the cache; the replay must not.
    kwargs |= {name: None for name in ("past_key_values", "layer_past") if name in kwargs}
    module.forward(**kwargs)


def rotate_back(rotated: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Undo the common (half-split) rotary embedding on the first cos.shape[-1] dims of [B, H, T, D].

    cos² + sin² is the square of the attention scaling (1 unless YaRN or the like), which the
    embedding applied once: dividing by it undoes that too.
    """
    dims = cos.shape[-1]
    cos, sin = cos.unsqueeze(1).float(), sin.unsqueeze(1).float()
    length = cos**2 + sin**2
    cos, sin = cos / length, sin / length
    part = rotated[..., :dims].float()
    (first, second), (sin_first, sin_second) = part.chunk(2, -1), sin.chunk(2, -1)
    back = part * cos
    back[..., : dims // 2].addcmul_(second, sin_first)
    back[..., dims // 2 :].addcmul_(first, sin_second, value=-1)
    back = back.to(rotated.dtype)
    return back if dims == rotated.shape[-1] else torch.cat((back, rotated[..., dims:]), -1)


def _agrees(query: Tensor, key: Tensor, rotation: Rotation, replayed: Rotation | None) -> bool:
    if replayed is None or rotation[0].shape[-1] > query.shape[-1] or rotation[0].shape[-1] % 2:
        return False
    for rotated, exact in zip((query, key), replayed, strict=True):
        back = rotate_back(rotated, *rotation)
        if back.shape != exact.shape:
            return False
        tolerance = _AGREEMENT.get(exact.dtype, _AGREEMENT_LOW_PRECISION_EPS * torch.finfo(exact.dtype).eps)
        if not (back - exact).abs().max() <= tolerance * exact.abs().max():
            return False
    return True
