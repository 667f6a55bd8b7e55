"""What is measured: Llama-3-8B's shape on a GPU, and the same, tiny, for `--dry`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CODEWORDS = 64
"""Of a head's codebook, as they are unless told otherwise."""
SPECTRAL = {
    "spectral": {"rank": 0.5, "bits": 2, "rows": 16},
    "spectral, rows 8": {"rank": 0.5, "bits": 2, "rows": 8},
    "spectral, quarter of 4 bits": {"rank": 0.25, "bits": 4, "rows": 16},
}
"""Dimensions of a code as a share of the head's, bits of each, bits of keys and values."""


@dataclass(frozen=True)
class Sizes:
    lengths: tuple[int, ...] = (131072, 32768, 8192, 262144)
    """Tokens held with the coming one, those of the targets first."""
    batches: tuple[int, ...] = (1, 8)
    heads: int = 8
    """KV heads."""
    group: int = 4
    dims: int = 128
    rank: int = 32
    keep: int = 2048
    """Tokens that every method reads."""
    per_cluster: tuple[int, ...] = (80, 16)
    window: int = 320
    sinks: int = 16
    recent: int = 16
    """Of spectral: last tokens, always read."""
    sample: int = 1024
    """Of spectral: scores that its threshold is taken from."""
    gate: int = 32768
    gate_long: int = 131072
    segment: int = 8192
    """Tokens of the gate's k-means."""
    hidden: int = 4096
    intermediate: int = 14336
    layers: int = 32
    vocabulary: int = 128256
    spare: int = 64
    """Tokens that a model's rows have room for: its warm and its measured steps."""
    numbers: str = "bfloat16"
    """Type of weights, keys and values."""

    @property
    def dtype(self) -> Any:
        import torch

        return getattr(torch, self.numbers)

    @property
    def itemsize(self) -> int:
        return 4 if self.numbers == "float32" else 2

    @property
    def scaling(self) -> float:
        return self.dims**-0.5

    @property
    def methods(self) -> tuple[str, ...]:
        """Whose attention steps are measured, the most telling first."""
        most, least = (f"clusterkv {tokens}" for tokens in self.per_cluster)
        _, *more = SPECTRAL
        return ("dense", most, "spectral", "loki", more[0], least, "loki, own index", "loki, sampled", *more[1:])

    def config(self, length: int) -> Any:
        """Of the model whose attention has this shape."""
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads * self.group,
            num_key_value_heads=self.heads,
            head_dim=self.dims,
            vocab_size=self.vocabulary,
            max_position_embeddings=length,
        )


FULL = Sizes()
DRY = Sizes(
    lengths=(192, 128),
    batches=(1, 2),
    heads=2,
    group=4,
    dims=32,
    rank=16,
    keep=48,
    per_cluster=(8, 4),
    window=24,
    sinks=4,
    recent=8,
    sample=32,
    gate=136,
    gate_long=200,
    segment=96,
    hidden=64,
    intermediate=96,
    layers=2,
    vocabulary=64,
    spare=4,
)
