"""The tensors of a saved layer, which a stranger may have written: every count, index and shape is checked against the
others before a gather or a kernel relies on it.

A store's `check` asks for each of its tensors by name, dtype and shape; tensors that it does not ask for are refused.
It cannot tell whether keys and values are those of the text: whoever can write the file can write another text's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...artifacts import KvcalError

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Saved:
    """The saved tensors of one layer, on the CPU."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors
        self._asked: set[str] = set()
        valid = self.take("valid", torch.bool, None, None)
        require("valid", valid.view(torch.uint8) <= 1, "zeros and ones")
        self.batch, self.seen = valid.shape
        """Sequences of the batch; positions so far."""
        held = self.take("lengths", torch.int64, self.batch)
        require("lengths", held == valid.sum(1), "as many as `valid` has")
        self.lengths: list[int] = held.tolist()
        self.longest = max(self.lengths, default=0)

    key: Tensor
    """[B, Hkv, tokens, D], once `take_tokens` has found it."""
    value: Tensor
    """[B, Hkv, tokens, Dv]"""
    held: list[int]
    """Tokens of each sequence that are held, where some were evicted."""

    def take_tokens(self, tokens: int | None) -> None:
        """Take keys and values of so many tokens per sequence (None: any)."""
        self.key = self.take("tokens.key", FLOATS, self.batch, None, tokens, None)
        self.value = self.take("tokens.value", FLOATS, *self.key.shape[:3], None)
        if not (self.key.shape[1] and self.key.shape[3] and self.value.shape[3]):
            raise KvcalError(f"tokens.key has shape {list(self.key.shape)}, expected heads and dimensions")

    def take_received(self) -> None:
        """Take the attention that each token has received."""
        received = self.take("tokens.received", torch.float32, *self.key.shape[:3], 1)
        require("received", received >= 0, "no negative attention")

    def has(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str, dtype: torch.dtype | Sequence[torch.dtype], *shape: int | None) -> Tensor:
        """A tensor of one of these dtypes and this shape (None: any size), all of it finite.

        Raises:
            KvcalError: it is missing, of another dtype or shape, or not finite.
        """
        if name not in self._tensors:
            raise KvcalError(f"{name} is missing")
        self._asked.add(name)
        tensor = self._tensors[name]
        dtypes = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
        if tensor.dtype not in dtypes:
            raise KvcalError(f"{name} is of {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
        fits = len(tensor.shape) == len(shape) and all(
            want in (None, size) for want, size in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise KvcalError(f"{name} has shape {list(tensor.shape)}, expected [{wanted}]")
        if tensor.is_floating_point():
            require(name, tensor.isfinite(), "finite numbers")
        return tensor

    def counts(self, name: str, most: Sequence[int]) -> list[int]:
        """Counts, saved as [B] int64: of each sequence at most so many."""
        counts = self.take(name, torch.int64, self.batch)
        require(name, (counts >= 0) & (counts <= torch.tensor(most)), f"0 to {max(most, default=0)}")
        return [int(count) for count in counts]

    def check_empty(self, empty: Mapping[str, Tensor]) -> None:
        """Raises KvcalError where this is not the state of a store without tokens, which `empty` is."""
        for name in sorted(self._tensors.keys() | empty.keys()):
            found, wanted = self._tensors.get(name), empty.get(name)
            if found is None or wanted is None or found.shape != wanted.shape:
                raise KvcalError(f"{name}: the cache has no rows, and an empty one has another of that name, or none")

    def finish(self) -> None:
        """Raises KvcalError for tensors that nobody asked for."""
        for name in sorted(self._tensors.keys() - self._asked):
            raise KvcalError(f"{name} is not of this method")


def require(name: str, holds: Tensor, expected: str) -> None:
    """Raise KvcalError that names the first False entry of `holds`."""
    if not bool(holds.all()):
        index = (~holds).nonzero()[0].tolist()
        raise KvcalError(f"{name}{index}: expected {expected}")
