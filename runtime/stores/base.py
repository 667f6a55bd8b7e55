"""What a store is: one layer's cache, and the attention of one decoded token over it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...artifacts import KvcalError
from ..attention import Logits
from ..kv.buffers import Places, TokenBuffer, find_places
from ..kv.saved import Saved

if TYPE_CHECKING:
    from .full import FullStore


class Store(ABC):
    """Keys and values of B rows of one layer, of unequal lengths; padding is never stored.

    Shapes throughout: query [B, Hq, T, D], key [B, Hkv, T, D], value [B, Hkv, T, Dv], output [B, Hq, T, Dv].
    """

    keeps_all_tokens: bool
    """Whether every token stays, so that any later query can read it."""
    query_aware = False
    """Whether what it forgets after a prompt is meant to be chosen by the question that the prompt ends in."""

    takes_mass = False
    """Whether it starts from the attention that each token has received, which a prefill has to record for it."""

    def __init__(self) -> None:
        self.rows: dict[str, TokenBuffer] = {}
        """Per-token tensors [B, Hkv, tokens, …]."""
        self.totals: dict[str, Tensor] = {}
        """Running sums [B, Hkv, …]."""
        self.lengths: list[int] = []
        """Tokens of each row so far, padding left out."""
        self.seen = 0
        """Positions so far, padding included: what `get_seq_length()` counts."""
        self.valid: Tensor | None = None
        """[B, seen] bool on the CPU, which positions were no padding; None: all."""
        self._read = 0
        self._tentative = False

    # What a method defines

    @abstractmethod
    def prefill(self, query: Tensor, key: Tensor, value: Tensor, logits: Logits, valid: Tensor | None = None) -> Tensor:
        """Take in T tokens and attend densely from each of them.

        Args:
            valid: [B, T] bool on the CPU, False at padding; None = no padding.
        """

    @abstractmethod
    def append(self, key: Tensor, value: Tensor, valid: Tensor | None = None) -> None:
        """Take in one decoded token per row."""

    @abstractmethod
    def attend(self, query: Tensor, logits: Logits) -> Tensor:
        """Attend from the token that was appended last, T = 1."""

    @abstractmethod
    def crop(self, tokens: int) -> None:
        """Forget the last `tokens` positions, as if they had never come."""

    @abstractmethod
    def adopt(self, full: FullStore) -> None:
        """Take over the tokens of a `full` store, as if they had been prefilled here."""

    @abstractmethod
    def read_mask(self) -> Tensor:
        """[B, Hq or Hkv, L] bool: the tokens of each row that the last `attend` read keys and values of, L the
        longest row."""

    def make_room(self) -> None:  # noqa: B027 (most methods forget nothing)
        """Forget what the next token will make this store forget, before anything is known of that token. Several
        that come at once then find what a single one would find."""

    def attend_all(self, query: Tensor, logits: Logits) -> Tensor:
        """Attend densely from each of the T tokens of the last `prefill` with other queries: those of a layer that
        reads this store. Right after it, or after a `crop` back to it; only stores that keep every token can."""
        raise NotImplementedError(f"{type(self).__name__} does not keep every token")

    # What all share

    def tentative(self, on: bool) -> None:
        """Whether tokens appended from now on may be taken back by `crop` (speculative decoding)."""
        self._tentative = on

    def resident_bytes(self) -> int:
        """Bytes held, the slack of growing buffers included."""
        return sum(rows.nbytes() for rows in self.rows.values()) + sum(total.nbytes for total in self.totals.values())

    def bytes_read(self) -> int:
        """Bytes of cache, index and projections that the last `attend` read."""
        return self._read

    def reading(self) -> Callable[[], int]:
        """What tells `bytes_read` of this step later, too: to know it may mean to wait for the device."""
        read = self.bytes_read()
        return lambda: read

    def like(self) -> tuple[Tensor | None, Tensor | None]:
        """Tensors of the heads, dimensions and dtype of the keys and values that came; None before the first."""
        key, value = (self.rows[name].tensor if name in self.rows else None for name in ("key", "value"))
        return key, value

    def shared_bytes(self) -> int:
        """Of `bytes_read`, what is read once for all rows: maps of a basis."""
        return 0

    def select(self, index: Tensor) -> None:
        """Keep the rows `index` [B'] of the batch, in that order, repeats allowed (beams)."""
        if not self.lengths:
            return
        chosen = index.tolist()
        self.lengths = [self.lengths[row] for row in chosen]
        if self.valid is not None:
            self.valid = self.valid[index.cpu()]
        for rows in self.rows.values():
            rows.keep(index)
        self.totals = {name: total.index_select(0, index.to(total.device)) for name, total in self.totals.items()}

    def to(self, device: torch.device | str) -> None:
        for rows in self.rows.values():
            if rows.tensor is not None and rows.moves:
                rows.tensor = rows.tensor.to(device, non_blocking=True)
        self.totals = {name: total.to(device, non_blocking=True) for name, total in self.totals.items()}

    def state(self) -> dict[str, Tensor]:
        """All that has to be written to go on later; `restore` takes it."""
        state = {f"rows.{name}": rows.view for name, rows in self.rows.items()}
        state |= {f"totals.{name}": total for name, total in self.totals.items()}
        state["lengths"] = torch.tensor(self.lengths, dtype=torch.int64)
        state["valid"] = self.valid if self.valid is not None else torch.ones(len(self.lengths), self.seen).bool()
        return state

    def check(self, saved: Saved) -> None:
        """Raises KvcalError: no store of this method and these settings has such a `state`."""
        if saved.rows:
            self._check(saved)
            saved.finish()
        else:
            saved.check_empty(self.state())

    @abstractmethod
    def _check(self, saved: Saved) -> None:
        """Ask for all tensors but `valid` and `lengths`, and hold them against one another."""

    def restore(self, state: dict[str, Tensor]) -> None:
        for name, tensor in state.items():
            kind, _, rest = name.partition(".")
            if kind == "rows":
                self.rows[rest] = self._buffer(rest)
                self.rows[rest].replace(tensor)
            elif kind == "totals":
                self.totals[rest] = tensor
        self.lengths = state["lengths"].tolist()
        self.seen = state["valid"].shape[1]
        self.valid = None if bool(state["valid"].all()) else state["valid"].cpu()

    def _buffer(self, name: str) -> TokenBuffer:
        """An empty one for the tensor `name`."""
        return TokenBuffer()

    def _advance(self, key: Tensor, valid: Tensor | None, held: list[int] | None = None) -> Places:
        """Count the new tokens; where they go, after the `held` tokens of each row (by default all of its tokens)."""
        tokens = key.shape[2]
        self.lengths = self.lengths or [0] * key.shape[0]
        if len(self.lengths) != key.shape[0]:
            raise KvcalError(
                f"the cache holds {len(self.lengths)} rows, got a batch of {key.shape[0]}: begin a new cache, or match "
                "its rows with batch_repeat_interleave or batch_select_indices"
            )
        places = find_places(self.lengths if held is None else held, tokens, valid, key.device)
        if self.valid is not None or valid is not None:
            past = self.valid if self.valid is not None else torch.ones(key.shape[0], self.seen).bool()
            new = valid if valid is not None else torch.ones(key.shape[0], tokens).bool()
            self.valid = torch.cat((past, new), 1)
        self.seen += tokens
        if held is None:
            self.lengths = places.after
        else:
            counts = [tokens] * key.shape[0] if valid is None else valid.sum(1).tolist()
            self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        return places

    def _retreat(self, tokens: int) -> None:
        """Uncount the last `tokens` positions."""
        if tokens > self.seen:
            raise KvcalError(f"cannot crop {tokens} tokens from a cache of {self.seen}")
        if self.valid is None:
            self.lengths = [length - tokens for length in self.lengths]
        else:
            lost = self.valid[:, self.seen - tokens :].sum(1).tolist()
            self.lengths = [length - count for length, count in zip(self.lengths, lost, strict=True)]
            self.valid = self.valid[:, : self.seen - tokens]
        self.seen -= tokens
