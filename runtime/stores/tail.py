"""The tail: what a selecting method does not read contributes through its cluster.

Without one, what is not read is treated as absent. With one, a cluster of n tokens of which m were read stands for
n - m tokens at the cluster's mean key, with its mean value:

    out = (Σ_read e^{q·k} v + Σ_c (n_c - m_c) e^{q·k̄_c} v̄_c) / (Σ_read e^{q·k} + Σ_c (n_c - m_c) e^{q·k̄_c})

The mean key keeps the tokens that were read. That makes it too large for what is left, and e^{q·k̄} is below the
mean of e^{q·k} (Jensen): the two errors partly cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kv.buffers import Places, TokenBuffer
from .clusters import Clusters, slot_index

OWNER = "cluster.of"


@dataclass(frozen=True)
class Remainder:
    """What was not read, as one token per cluster."""

    logits: Tensor
    """[B, Hkv, G, C] float32, -inf where nothing is left."""
    values: Tensor
    """[B, Hkv, C, Dv]"""
    bytes_read: int


class Tail:
    """Knows the cluster of every token, in the tensor `cluster.of` [B, Hkv, S, 1] int32 of its store."""

    def __init__(self, rows: dict[str, TokenBuffer], clusters: Clusters):
        """Args: rows: of the store."""
        self._rows, self._clusters = rows, clusters

    def remember(self, slots: Sequence[range], labels: Tensor, lengths: list[int]) -> None:
        """These slots of each row are now in the clusters `labels` [B, Hkv, L]."""
        index, held = slot_index(slots, labels.device)
        row, _, token = held.nonzero(as_tuple=True)
        places = Places(lengths, (row, token, index[row, 0, token]), None)
        self._rows.setdefault(OWNER, TokenBuffer()).write(labels.to(torch.int32).unsqueeze(-1), places)

    def shorten(self) -> None:
        """Forget the clusters of tokens that are in none any more."""
        used = max(self._clusters.upto, default=0)
        if OWNER in self._rows:
            self._rows[OWNER].used = min(used, self._rows[OWNER].used)
            if not used:
                del self._rows[OWNER]

    def remainder(self, logits: Tensor, slot: Tensor, counted: Tensor) -> Remainder:
        """What is left of each cluster when some tokens have been read.

        Args:
            logits: [B, Hkv, G, C] float32, of each cluster's mean key.
            slot: [B, Hkv, G or 1, k] int64, the tokens that were read.
            counted: the same shape, bool: which of them are not padding, and are in a cluster.
        """
        of, sizes, values = self._rows[OWNER].view, self._clusters.sizes, self._clusters.values
        batch = torch.arange(of.shape[0], device=of.device).view(-1, 1, 1, 1)
        heads = torch.arange(of.shape[1], device=of.device).view(1, -1, 1, 1)
        # What was never clustered has no entry, or a stale one, and is not counted.
        owner = of[batch, heads, slot.clamp_max(of.shape[2] - 1)].squeeze(-1).long()
        left = sizes.unsqueeze(2).expand(-1, -1, owner.shape[2], -1).to(torch.int64, copy=True)
        left.scatter_add_(-1, owner.clamp(0, left.shape[-1] - 1), -counted.to(torch.int64))
        left.masked_fill_(~self._clusters.there(left.device).unsqueeze(2), 0)
        read = values.nbytes + owner.numel() * of.element_size()
        return Remainder(logits + left.float().log(), values, read)
