"""The calibrated tensors of `spectral` in one layer: codewords, and the basis of the difference k − k′ of a key and its
codeword."""

from __future__ import annotations

import torch

from ...artifacts import Artifact
from ...kernels.codes import Calibrated, rotation

OF_ALL_HEADS = ("turn_key", "turn_value")


class Codewords:
    """The tensors of one layer, on every device that asked for them. Tables that steps read are rounded to bfloat16."""

    def __init__(self, tables: Calibrated, rank: int):
        self.heads, self.count, self.dims = tables["key"].shape
        self.value_dims, self.rank = tables["value"].shape[-1], rank
        self._tensors = {torch.device("cpu"): tables}

    @classmethod
    def load(cls, artifact: Artifact, layer: int, rank: int) -> Codewords:
        """
        Args:
            rank: dimensions of a code.
        """
        key, value, spread, query_map, key_map = (
            artifact.tensor("codebook", layer, name).double()
            for name in ("key", "value", "spread", "code.query_map", "code.key_map")
        )
        inverse = spread.square().reciprocal().view(len(spread), 2, 1, 1)
        norms = [words.square().sum(-1).unsqueeze(1) * inverse[:, part] for part, words in enumerate((key, value))]
        turned = rotation(rank)
        tensors = {
            "key": key,
            "value": value,
            "half": (norms[0] + norms[1]) / 2,
            "query_map": (turned @ query_map[:, :rank]).mT,
            "key_map": (turned @ key_map[:, :rank]).mT,
        }
        rounded = {name: tensor.bfloat16().float().contiguous() for name, tensor in tensors.items()}
        # Rotations are not rounded: in 16 bits they are not orthonormal, and turning back does not restore a key. Nor
        # are they tables that a step has to read: a fast transform does the same.
        rounded["turn_key"] = rotation(key.shape[-1]).float()
        rounded["turn_value"] = rotation(value.shape[-1]).float()
        # The codeword c nearest to x has the least ½|c|² − x·c, with keys and values each divided by their spread.
        rounded["inverse"] = inverse.float()
        rounded["head"] = torch.arange(len(key)).unsqueeze(1)
        return cls(Calibrated(rounded), rank)

    def on_heads(self, heads: slice) -> Codewords:
        """Those of some KV heads."""
        tables = self.on(torch.device("cpu"))
        of_heads = {name: part if name in OF_ALL_HEADS else part[heads].contiguous() for name, part in tables.items()}
        of_heads["head"] = torch.arange(len(of_heads["key"])).unsqueeze(1)
        return Codewords(Calibrated(of_heads), self.rank)

    def on(self, device: torch.device) -> Calibrated:
        """The tables, and with them "query_map" [Hkv, D, r]: q·(k − k′) ≈ (q query_map)·((k − k′) key_map), rotated so
        that the r dimensions are alike. `tables["key"][tables["head"], words]` are the codewords of the numbers `words`
        [B, Hkv, T]."""
        if device not in self._tensors:
            on_cpu = self._tensors[torch.device("cpu")]
            self._tensors[device] = Calibrated((name, tensor.to(device)) for name, tensor in on_cpu.items())
        return self._tensors[device]

    def nbytes(self, *names: str) -> int:
        return sum(2 * self.on(torch.device("cpu"))[name].numel() for name in names)
