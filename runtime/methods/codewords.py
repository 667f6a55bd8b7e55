"""What `spectral` was fitted with in one layer: codewords, and the basis of what they leave of keys."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...artifacts import Artifact
from ...kernels.codes import rotation


class Codewords:
    """The tensors of one layer, on every device that asked for them: tables of bfloat16 numbers, which is what steps
    read."""

    def __init__(self, artifact: Artifact, layer: int, rank: int):
        """
        Args:
            rank: dimensions of a code.
        """
        key, value, spread, query_map, key_map = (
            artifact.tensor("codebook", layer, name).double()
            for name in ("key", "value", "spread", "code.query_map", "code.key_map")
        )
        inverse = spread.square().reciprocal().view(len(spread), 2, 1, 1)
        by_part = [of.square().sum(-1).unsqueeze(1) * inverse[:, at] for at, of in enumerate((key, value))]
        turned = rotation(rank)
        tensors = {
            "key": key,
            "value": value,
            "half": (by_part[0] + by_part[1]) / 2,
            "query_map": (turned @ query_map[:, :rank]).mT,
            "key_map": (turned @ key_map[:, :rank]).mT,
        }
        rounded = {name: tensor.bfloat16().float().contiguous() for name, tensor in tensors.items()}
        # Rounded to 16 bits a rotation is not orthonormal, and turning back does not restore a row. Steps need not read
        # it as a table: a fast transform does the same.
        rounded["turn_key"] = rotation(key.shape[-1]).float()
        rounded["turn_value"] = rotation(value.shape[-1]).float()
        # The nearest codeword c has the least ½|c|² − x·c, keys and values each over their spread.
        rounded["inverse"] = inverse.float()
        self.heads, self.count, self.dims = key.shape
        self.value_dims, self.rank = value.shape[-1], rank
        rounded["head"] = torch.arange(self.heads).unsqueeze(1)
        self._tensors = {torch.device("cpu"): rounded}

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """By name, float32.

        "key" [Hkv, C, D], "value" [Hkv, C, Dv]: the codewords, of which `of["key"][of["head"], words]` takes some.
        "half" [Hkv, 1, C], "inverse" [Hkv, 2, 1, 1]: what finds the nearest. "query_map", "key_map" [Hkv, D, r]:
        q·(k − codeword) ≈ (q query_map)·((k − codeword) key_map), in dimensions that are alike. "turn_key" [D, D],
        "turn_value" [Dv, Dv]: the rotations of rows of 8 bits.
        """
        if device not in self._tensors:
            first = self._tensors[torch.device("cpu")]
            self._tensors[device] = {name: tensor.to(device) for name, tensor in first.items()}
        return self._tensors[device]

    def nbytes(self, *names: str) -> int:
        return sum(2 * self.on(torch.device("cpu"))[name].numel() for name in names)


def nearest(of: Mapping[str, Tensor], key: Tensor, value: Tensor) -> Tensor:
    """[B, Hkv, T] int64: the codeword of each token of [B, Hkv, T, D] and [B, Hkv, T, Dv].

    Args:
        of: `Codewords.on`.
    """
    by_key, by_value = key.float() * of["inverse"][:, 0], value.float() * of["inverse"][:, 1]
    return (of["half"] - by_key @ of["key"].mT - by_value @ of["value"].mT).argmin(-1)
