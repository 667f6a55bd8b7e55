"""The tensors of a saved layer, which a stranger may have written: every count, index and shape is held against the
others before a gather or a kernel goes by it.

A store's `check` asks for each of its tensors by name, dtype and shape; what nobody asks for is refused. What it cannot
tell is whether keys and values are those of the text: whoever can write the file can write another text's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...artifacts import KvcalError

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Saved:
    """Of one layer, on the CPU."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors
        self._asked: set[str] = set()
        valid = self.take("valid", torch.bool, None, None)
        require("valid", valid.view(torch.uint8) <= 1, "zeros and ones")
        self.rows, self.seen = valid.shape
        """Of the batch, and positions so far."""
        held = self.take("lengths", torch.int64, self.rows)
        require("lengths", held == valid.sum(1), "as many as `valid` has")
        self.lengths: list[int] = held.tolist()
        self.longest = max(self.lengths, default=0)

    key: Tensor
    """[B, Hkv, tokens, D], once `take_tokens` has found it."""
    value: Tensor
    """[B, Hkv, tokens, Dv]"""
    held: list[int]
    """Tokens of each row that are held, where not all are."""

    def take_tokens(self, tokens: int | None) -> None:
        """Keys and values of so many tokens per row (None: any)."""
        self.key = self.take("tokens.key", FLOATS, self.rows, None, tokens, None)
        self.value = self.take("tokens.value", FLOATS, *self.key.shape[:3], None)
        if not (self.key.shape[1] and self.key.shape[3] and self.value.shape[3]):
            raise KvcalError(f"tokens.key has shape {list(self.key.shape)}, expected heads and dimensions")

    def take_received(self) -> None:
        """What each token has received of all attention."""
        received = self.take("tokens.received", torch.float32, *self.key.shape[:3], 1)
        require("received", received >= 0, "no negative attention")

    def has(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str, dtype: torch.dtype | Sequence[torch.dtype], *shape: int | None) -> Tensor:
        """A tensor of one of these dtypes and this shape (None: any size), all of it finite.

        Raises:
            KvcalError: there is none, or another one.
        """
        if name not in self._tensors:
            raise KvcalError(f"{name} is missing")
        self._asked.add(name)
        found = self._tensors[name]
        dtypes = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
        if found.dtype not in dtypes:
            raise KvcalError(f"{name} is of {found.dtype}, expected {' or '.join(map(str, dtypes))}")
        fits = len(found.shape) == len(shape) and all(
            want in (None, size) for want, size in zip(shape, found.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise KvcalError(f"{name} has shape {list(found.shape)}, expected [{wanted}]")
        if found.is_floating_point():
            require(name, found.isfinite(), "finite numbers")
        return found

    def counts(self, name: str, most: Sequence[int]) -> list[int]:
        """[B] int64 counts, of each row at most so many."""
        found = self.take(name, torch.int64, self.rows)
        require(name, (found >= 0) & (found <= torch.tensor(most)), f"0 to {max(most, default=0)}")
        return [int(count) for count in found]

    def check_empty(self, empty: Mapping[str, Tensor]) -> None:
        """Raises KvcalError: another state than that of a store that nothing came to."""
        for name in sorted(self._tensors.keys() | empty.keys()):
            found, wanted = self._tensors.get(name), empty.get(name)
            if found is None or wanted is None or found.shape != wanted.shape:
                raise KvcalError(f"{name}: the cache has no rows, and an empty one has another of that name, or none")

    def finish(self) -> None:
        """Raises KvcalError for tensors that nobody asked for."""
        for name in sorted(self._tensors.keys() - self._asked):
            raise KvcalError(f"{name} is not of this method")


def require(name: str, holds: Tensor, expected: str) -> None:
    """Raise KvcalError for the first entry of a tensor that does not hold."""
    if not bool(holds.all()):
        index = (~holds).nonzero()[0].tolist()
        raise KvcalError(f"{name}{index}: expected {expected}")
