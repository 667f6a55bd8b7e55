"""What a step is: the attention of one decoded token per row over a store's buffers, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.append import append
from ..attention import Logits
from ..stores import Store
from .clock import Clock


class Step:
    """Every row gets one token per step; nothing that it does waits for the device or depends on values there.

    The store's lengths on the host stand still meanwhile, until `settle`.
    """

    def __init__(self, store: Store, clock: Clock):
        self.store, self.clock = store, clock
        self.capacity = 0

    def step(self, query: Tensor, key: Tensor, value: Tensor, logits: Logits) -> Tensor:
        """[B, Hq, 1, D], [B, Hkv, 1, D], [B, Hkv, 1, Dv] -> [B, Hq, 1, Dv]."""
        self.write(key[:, :, 0], value[:, :, 0])
        return self.read(query, logits)

    def read(self, query: Tensor, logits: Logits) -> Tensor:
        """[B, Hq, 1, D] -> [B, Hq, 1, Dv], after `write`: all that a layer does that reads another's store."""
        grouped = query.squeeze(2).unflatten(1, (self.buffer("key").shape[1], -1))
        return self.attend(grouped, logits).flatten(1, 2).unsqueeze(2)

    def attend(self, query: Tensor, logits: Logits) -> Tensor:
        """[B, Hkv, G, D] -> [B, Hkv, G, Dv]."""
        raise NotImplementedError

    def write(self, key: Tensor, value: Tensor) -> None:
        """The new tokens [B, Hkv, D | Dv], each to the end of its row."""
        append(key, value, None, self.buffer("key"), self.buffer("value"), None, self.clock.held)

    def reserve(self, capacity: int) -> None:
        """Make room for rows of `capacity` tokens, and see to what is due. Addresses may change."""
        self.capacity = capacity
        for name in self.per_token:
            self.store.rows[name].reserve(capacity, self.store.rows[name].view)

    def due(self, tokens: int) -> bool:
        """Whether the host has to see to the store before the next token, `tokens` after `settle`."""
        return False

    def settle(self, tokens: int) -> None:
        """Tell the store of so many decoded tokens per row."""
        store = self.store
        store.lengths = [length + tokens for length in store.lengths]
        store.seen += tokens
        if store.valid is not None:
            store.valid = torch.cat((store.valid, store.valid.new_ones(store.valid.shape[0], tokens)), 1)
        for name in self.per_token:
            store.rows[name].used = max(store.lengths)

    @property
    def per_token(self) -> tuple[str, ...]:
        """The store's tensors that have an entry per token."""
        return ("key", "value")

    def changed(self) -> list[Tensor]:
        """What a step changes but the slots of the coming token."""
        return []

    def buffer(self, name: str) -> Tensor:
        """[B, Hkv, capacity, …], to the end of its capacity."""
        tensor = self.store.rows[name].tensor
        assert tensor is not None
        return tensor

    def addresses(self) -> tuple[tuple[int, int], ...]:
        """(address, capacity) of everything that a step reads or writes: a graph captured with others is void."""
        tensors = [rows.tensor for rows in self.store.rows.values() if rows.tensor is not None]
        return tuple((tensor.data_ptr(), tensor.shape[2]) for tensor in tensors)
