"""What calibration would have found for `spectral` of keys as caches.py draws them: random codewords, a given basis.

Built by hand, since a machine with a GPU need not have what calibration clusters with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcal.artifacts import Artifact, Layer, ModelIdentity, Stage
from kvcal.runtime.methods.spectral import Spectral

from .sizes import CODEWORDS, SPECTRAL, Sizes


def settings(sizes: Sizes, name: str = "spectral") -> Spectral:
    """
    Args:
        name: of `SPECTRAL`.
    """
    return Spectral(
        keep=sizes.keep, select="max", sinks=sizes.sinks, recent=sizes.recent, sample=sizes.sample,
        **SPECTRAL[name],  # type: ignore[arg-type]
    )  # fmt: skip


def fitted(sizes: Sizes, basis: Tensor, layers: int = 1) -> Artifact:
    """
    Args:
        basis: [Hkv, D, D] orthonormal rows, the same of all layers.
    """
    generator = torch.Generator().manual_seed(4)
    rows = basis.float().cpu()
    key, value = (0.1 * torch.randn(sizes.heads, CODEWORDS, sizes.dims, generator=generator) for _ in "kv")
    tensors = {
        "key": key,
        "value": value,
        "spread": torch.ones(sizes.heads, 2),
        "code.query_map": rows,
        "code.key_map": rows,
        "code.singular_values": torch.ones(sizes.heads, sizes.dims),
    }
    shape = (sizes.heads, sizes.heads * sizes.group, sizes.dims, sizes.dims, sizes.scaling, None, "none")
    named = {f"layers.{layer}.{name}": of for layer in range(layers) for name, of in tensors.items()}
    return Artifact(
        model=ModelIdentity("random", None, {}, ""),
        layers=tuple(Layer(index, *shape) for index in range(layers)),
        data={},
        settings={},
        versions={},
        stages={"codebook": Stage(named)},
    )
