"""Contiguous caches laid out by page: all else in the pieces is NaN, and the table is garbage where it may be."""

import torch

from kvcal.kernels.pages import PAGE, PageLayout, Part

GARBAGE = (-1, 2**31 - 1)
"""In turn where a sequence has no page."""
SPARE = 3
"""Pages that nobody has."""


def pages_of(lengths, pages):
    """[B, pages] bool: those of sequences of these lengths."""
    return torch.arange(pages) * PAGE < torch.as_tensor(lengths).unsqueeze(-1).cpu()


class Paged:
    """Caches [B, Hkv, P · PAGE, width] by name, by page."""

    def __init__(self, caches, held, dtype=torch.int32, heads_first=False):
        """
        Args:
            held: [B, P] bool, pages that sequences have; the numbers of others are left out.
            dtype: of the table.
            heads_first: pieces lie by head, then page.
        """
        device, heads = caches["key"].device, caches["key"].shape[1]
        generator = torch.Generator().manual_seed(2)
        count = int(held.sum()) + SPARE
        self.layout = PageLayout({name: Part(cache.shape[3], cache.dtype) for name, cache in caches.items()})
        order = (heads, count) if heads_first else (count, heads)
        pieces = torch.full((*order, self.layout.nbytes), 255, dtype=torch.uint8, device=device)  # NaN in every dtype
        self.pieces = pieces.transpose(0, 1) if heads_first else pieces
        self.parts = self.layout.parts_of(self.pieces)
        self.key, self.value = self.parts["key"], self.parts["value"]
        # A part of a wider table, so that neither its rows nor its start are those of a tensor of its own.
        wide = torch.tensor(GARBAGE, dtype=dtype).repeat(len(held), held.shape[1] + 3)[:, : held.shape[1] + 3]
        self.table = wide[:, 1:-2]
        self.table[held] = torch.randperm(count, generator=generator)[: count - SPARE].to(dtype)
        for sequence, page in held.nonzero().tolist():
            for name, cache in caches.items():
                tokens = cache[sequence, :, page * PAGE : (page + 1) * PAGE]
                self.parts[name][self.table[sequence, page].item()].copy_(tokens)
        self.table = wide.to(device)[:, 1:-2]
