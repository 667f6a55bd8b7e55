"""How many tokens each sequence of a batch has, and which positions were padding: the host's numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from ...artifacts import KvcalError


class Sequences:
    """Counts positions and tokens as they come and go. Padding is a position, and is no token of any sequence."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        """Tokens of each sequence so far, padding left out."""
        self.seen = 0
        """Positions so far, padding included: what `get_seq_length()` counts."""
        self.valid: Tensor | None = None
        """[B, seen] bool on the CPU, which positions were no padding; None: all."""

    def lengths_of(self, batch: int) -> list[int]:
        """Tokens of each sequence of a batch that comes. Raises KvcalError: it has another size than before."""
        lengths = self.lengths or [0] * batch
        if len(lengths) != batch:
            raise KvcalError(
                f"the cache holds {len(lengths)} rows, got a batch of {batch}: begin a new cache, or match its rows "
                "with batch_repeat_interleave or batch_select_indices"
            )
        return lengths

    def _advance(self, batch: int, tokens: int, valid: Tensor | None = None) -> None:
        """Count `tokens` new positions.

        Args:
            valid: [B, tokens] bool on the CPU, False at padding; None = no padding.

        Raises:
            KvcalError: the batch has another size than before.
        """
        lengths = self.lengths or [0] * batch
        if len(lengths) != batch:
            lengths = self.lengths_of(batch)  # which refuses it
        if self.valid is not None or valid is not None:
            past = self.valid if self.valid is not None else torch.ones(batch, self.seen).bool()
            new = valid if valid is not None else torch.ones(batch, tokens).bool()
            self.valid = torch.cat((past, new), 1)
        counts = [tokens] * batch if valid is None else valid.sum(1).tolist()
        self.lengths = [length + count for length, count in zip(lengths, counts, strict=True)]
        self.seen += tokens

    def _retreat(self, tokens: int) -> None:
        """Forget the last `tokens` positions. Raises KvcalError: there are fewer."""
        if tokens > self.seen:
            raise KvcalError(f"cannot crop {tokens} tokens from a cache of {self.seen}")
        lost = [tokens] * len(self.lengths)
        if self.valid is not None:
            lost = self.valid[:, self.seen - tokens :].sum(1).tolist()
            self.valid = self.valid[:, : self.seen - tokens]
        self.lengths = [length - count for length, count in zip(self.lengths, lost, strict=True)]
        self.seen -= tokens

    def _keep(self, order: Tensor) -> None:
        """Keep the sequences `order` [B'], in that order, repeats allowed."""
        self.lengths = [self.lengths[sequence] for sequence in order.tolist()]
        if self.valid is not None:
            self.valid = self.valid[order.cpu()]

    def _counts(self) -> dict[str, Tensor]:
        """ "lengths" [B] int64 and "valid" [B, seen] bool."""
        valid = self.valid if self.valid is not None else torch.ones(len(self.lengths), self.seen).bool()
        return {"lengths": torch.tensor(self.lengths, dtype=torch.int64), "valid": valid}

    def _count_again(self, lengths: Tensor, valid: Tensor) -> None:
        self.lengths, self.seen = lengths.tolist(), valid.shape[1]
        self.valid = None if bool(valid.all()) else valid.cpu()
