"""Operands of attend, window and tail in which everything that must not be read is NaN, and what they amount to."""

import torch
from attention_oracle import attention, make, poison, tokens

from kvcal.kernels.attend import attend, tail, window


class Problem:
    """Caches of which only the selected tokens, slots 0 … 9, and tokens of clusters are anything but NaN."""

    def __init__(
        self, device, counts, chosen, capacity=200, group=4, width=64, value_width=None, dtype=torch.float32, clusters=9
    ):
        """Args: counts: [B, Hkv] or [B, Hkv, G] selected tokens, of at most `chosen`."""
        generator = torch.Generator().manual_seed(1)
        self.count = torch.tensor(counts, dtype=torch.int32)
        batch, heads = self.count.shape[:2]
        self.query = make(generator, batch, heads, group, width, dtype=dtype).to(device)
        key = make(generator, batch, heads, capacity, width, dtype=dtype)
        value = make(generator, batch, heads, capacity, value_width or width, dtype=dtype)
        drawn = torch.rand(*self.count.shape, capacity - 10, generator=generator).argsort(-1)[..., :chosen] + 10
        counted = torch.arange(chosen) < self.count.unsqueeze(-1)
        self.index = torch.where(counted, drawn, 0).to(torch.int32).to(device)
        keep = torch.zeros(batch, heads, capacity + 1, dtype=torch.bool)
        keep.scatter_(2, torch.where(counted, drawn, capacity).flatten(2), True)
        keep[:, :, 1:10] = True
        self.key, self.value = (poison(cache, keep[:, :, :capacity]).to(device) for cache in (key, value))
        self.count = self.count.to(device)
        self.unread = torch.randint(0, 4, (batch, heads, clusters), generator=generator).float() * 1.5
        mean = make(generator, 2, batch, heads, clusters, width, dtype=dtype)
        self.mean_key = poison(mean[0], self.unread > 0).to(device)
        means = make(generator, batch, heads, clusters, value_width or width, dtype=dtype)
        self.mean_value = poison(means, self.unread > 0).to(device)
        self.unread = self.unread.to(device)
        self.begin, self.end = (torch.full((batch,), slot, dtype=torch.int32, device=device) for slot in (1, 10))

    def attend(self, backend, **options):
        return attend(self.query, self.key, self.value, self.index, self.count, backend=backend, **options)

    def window(self, backend, **options):
        return window(self.query, self.key, self.value, self.begin, self.end, backend=backend, **options)

    def tail(self, backend, **options):
        return tail(self.query, self.mean_key, self.mean_value, self.unread, backend=backend, **options)

    def expected(self, *parts, **logits):
        return attention(self.query, [getattr(self, part) for part in parts], **logits)

    def chosen(self, *where):
        count = self.count[where[: self.count.dim()]]
        slots = self.index[where[: self.count.dim()]][:count]
        return tokens(self.key, self.value, lambda *_: slots)(*where)

    def near(self, row, *where):
        slots = range(int(self.begin[row]), int(self.end[row]))
        return tokens(self.key, self.value, lambda *_: slots)(row, *where)

    def far(self, *where):
        unread = self.unread[where[: self.unread.dim() - 1]]
        there = unread > 0
        return self.mean_key[where[:2]][there], self.mean_value[where[:2]][there], unread[there]
