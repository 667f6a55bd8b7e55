"""What clustering a prompt costs beside its prefill, for one layer of Llama-3-8B's shape."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcal.runtime.methods.clusterkv import ClusterKVPolicy
from kvcal.runtime.methods.full import FullPolicy
from kvcal.runtime.settings import new_store

from .attention_steps import cluster_settings
from .caches import fill_pages
from .expected import LUMPS
from .sizes import Sizes
from .timing import Timer

Row = dict[str, Any]
CHUNK = 16384
"""Tokens of a prompt that go through the MLP at a time."""


@torch.no_grad()
def build_row(sizes: Sizes, length: int, per_cluster: int, calibrated: bool, timer: Timer) -> Row:
    """Milliseconds of one layer; `passes` of k-means, in the segment that took most of them.

    Args:
        calibrated: begun with given centroids; else by k-means++, one centroid after the other.
    """
    key, centres = lumps(sizes, length, timer.device)
    store = new_store(FullPolicy())
    fill_pages(store, key, torch.randn_like(key))
    policy = ClusterKVPolicy(cluster_settings(sizes, per_cluster), centres if calibrated else None)
    passes = 0

    def build() -> None:
        nonlocal passes
        sequence_index = policy.sequence_index()
        sequence_index.begin(1, timer.device)
        sequence_index.prefilled([0], [length], store.tokens)
        sequence_index.build(
            [length], [True], store.tokens
        )  # before the first decoded token: what no whole segment has
        passes = sequence_index.most_passes

    row: Row = {"per_cluster": per_cluster}
    built = timer.milliseconds(build)
    prefill = timer.milliseconds(prefill_layer(sizes, length, timer.device))
    row["passes"] = passes
    if built is not None and prefill is not None:
        row |= {"build_ms": built, "prefill_ms": prefill, "ratio": built / prefill}
    return row


def lumps(sizes: Sizes, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """([1, Hkv, S, D] keys, [Hkv, LUMPS, D] what they lie about)."""
    generator = torch.Generator(device).manual_seed(2)
    centres = torch.randn(sizes.heads, LUMPS, sizes.dims, generator=generator, device=device)
    of = torch.randint(LUMPS, (sizes.heads, tokens), generator=generator, device=device)
    noise = torch.randn(sizes.heads, tokens, sizes.dims, generator=generator, device=device)
    key = centres.gather(1, of.unsqueeze(-1).expand(-1, -1, sizes.dims)) + noise
    return key.to(sizes.dtype).unsqueeze(0), centres


def prefill_layer(sizes: Sizes, length: int, device: torch.device) -> Any:
    """A call: projections, causal attention, output projection and gated MLP of one prompt."""
    generator = torch.Generator(device).manual_seed(3)

    def weight(rows: int, columns: int) -> Tensor:
        drawn = torch.randn(rows, columns, generator=generator, device=device, dtype=sizes.dtype)
        return drawn / columns**0.5

    width = sizes.dims * sizes.heads
    maps = [weight(each, sizes.hidden) for each in (width * sizes.group, width, width)]
    back = weight(sizes.hidden, width * sizes.group)
    gate, up = weight(sizes.intermediate, sizes.hidden), weight(sizes.intermediate, sizes.hidden)
    down = weight(sizes.hidden, sizes.intermediate)
    text = torch.randn(1, length, sizes.hidden, generator=generator, device=device, dtype=sizes.dtype)

    def call() -> None:
        query, key, value = (F.linear(text, map).unflatten(-1, (-1, sizes.dims)).transpose(1, 2) for map in maps)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        hidden = text + F.linear(out.transpose(1, 2).flatten(2), back)
        for part in hidden.split(CHUNK, 1):
            part + F.linear(F.silu(F.linear(part, gate)) * F.linear(part, up), down)

    return call
