"""Attention steps of one layer on a CPU, beside the fastest that torch has."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcal.runtime.attention import SoftmaxSpec
from kvcal.runtime.methods.full import Full
from kvcal.runtime.methods.spectral import Spectral
from kvcal.runtime.settings import new_store

from ..gpu.caches import Copy, draw, fill_pages
from ..gpu.codebook import fitted
from ..gpu.sizes import Sizes
from .turns import Routine, in_turns

SHAPES = {
    "Llama-3-8B, bfloat16": Sizes(),
    "SmolLM2-135M, bfloat16": Sizes(heads=3, group=3, dims=64),
    "SmolLM2-135M, float32": Sizes(heads=3, group=3, dims=64, numbers="float32"),
}
LENGTHS = (8192, 32768, 131072)
SPECTRAL = {
    "spectral, 8-bit rows, keep .027": Spectral(rows=8, keep=0.02702),
    "spectral, its defaults": Spectral(),
}
"""Settings whose quality is in docs/results/real.md."""


@torch.no_grad()
def attention(sizes: Sizes, length: int) -> dict[str, Any]:
    """Milliseconds of an attention step by routine, and what our routines read."""
    copy = draw(sizes, 1, length, torch.device("cpu"))
    routines, read = baselines(copy, sizes), {}
    spec = SoftmaxSpec(sizes.scaling)
    for name, store in stores(copy, sizes).items():
        routines[name] = lambda store=store: store.attend(copy.query, spec)
        routines[name]()
        read[name] = store.bytes_read()
    return {"ms": in_turns(routines), "bytes_read": read}


def baselines(copy: Copy, sizes: Sizes) -> dict[str, Routine]:
    query, key, value, grouped = copy.query, copy.key, copy.value, copy.grouped

    def repeated() -> Tensor:
        many = (part.repeat_interleave(sizes.group, 1) for part in (key, value))
        return F.scaled_dot_product_attention(query, *many)

    def products() -> Tensor:
        weights = (grouped @ key.mT).float().mul_(sizes.scaling).softmax(-1)
        return weights.to(value.dtype) @ value

    return {
        "SDPA, enable_gqa": lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=True),
        "SDPA, repeated heads": repeated,
        "matmul": products,
        "SDPA, a group's queries as rows": lambda: F.scaled_dot_product_attention(grouped, key, value),
    }


def stores(copy: Copy, sizes: Sizes) -> dict[str, Any]:
    artifact = fitted(sizes, copy.basis)
    policies = {"full": Full().bind(0, sizes.dims, None)}
    policies |= {name: method.bind(0, sizes.dims, artifact) for name, method in SPECTRAL.items()}
    made = {name: new_store(policy) for name, policy in policies.items()}
    for store in made.values():
        fill_pages(store, copy.key, copy.value)
    return made
