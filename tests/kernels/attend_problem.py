"""Operands of attend in which everything that must not be read is NaN, and what they amount to."""

import torch
from attention_oracle import attention, make, poison
from paged_problem import Paged

from kvcal.kernels.attend import attend
from kvcal.kernels.pages import PAGE


class Problem:
    """Caches of which only the selected tokens are anything but NaN."""

    def __init__(self, device, counts, chosen, capacity=200, group=4, width=64, value_width=None, dtype=torch.float32):
        """
        Args:
            counts: [B, Hkv] or [B, Hkv, G] selected tokens, of at most `chosen`.
        """
        generator = torch.Generator().manual_seed(1)
        self.count = torch.tensor(counts, dtype=torch.int32)
        batch, heads = self.count.shape[:2]
        self.query = make(generator, batch, heads, group, width, dtype=dtype).to(device)
        key = make(generator, batch, heads, capacity, width, dtype=dtype)
        value = make(generator, batch, heads, capacity, value_width or width, dtype=dtype)
        drawn = torch.rand(*self.count.shape, capacity, generator=generator).argsort(-1)[..., :chosen]
        counted = torch.arange(chosen) < self.count.unsqueeze(-1)
        self.index = torch.where(counted, drawn, 0).to(torch.int32).to(device)
        keep = torch.zeros(batch, heads, capacity + 1, dtype=torch.bool)
        keep.scatter_(2, torch.where(counted, drawn, capacity).flatten(2), True)
        self.key, self.value = (poison(cache, keep[:, :, :capacity]).to(device) for cache in (key, value))
        self.count = self.count.to(device)

    def attend(self, backend, **options):
        return attend(self.query, self.key, self.value, self.index, self.count, backend=backend, **options)

    def by_page(self, **layout):
        """`Paged`, in which only pages with a selected token are anybody's; the capacity is whole pages."""
        kept = torch.cat((self.key, self.value), 3).isnan().all(3).logical_not().any(1)
        return Paged({"key": self.key, "value": self.value}, kept.unflatten(1, (-1, PAGE)).any(2).cpu(), **layout)

    def attend_by_page(self, backend, paged, **options):
        options |= {"table": paged.table, "backend": backend}
        return attend(self.query, paged.key, paged.value, self.index, self.count, **options)

    def expected(self, **logits):
        return attention(self.query, self.key, self.value, self.slots, **logits)

    def slots(self, *where):
        """
        Args:
            where: (sequence, head, query head).
        """
        group = where[: self.count.dim()]
        return self.index[group][: self.count[group]]
