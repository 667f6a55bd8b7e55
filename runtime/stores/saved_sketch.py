"""A saved sketch of `subgen`: of every token that has left the window, and of no others."""

from __future__ import annotations

import torch

from ..kv.saved import Saved, require
from .sketch import Shape


def check_sketch(saved: Saved, shape: Shape, left: list[int]) -> None:
    """Raise KvcalError for counts and shapes that no sketch has of `left` tokens of each row."""
    key, value = saved.key, saved.value
    batch, heads = key.shape[:2]
    saved.take("totals.value_key", key.dtype, batch, heads, shape.values, key.shape[3])
    saved.take("totals.value", value.dtype, batch, heads, shape.values, value.shape[3])
    mass = saved.take("totals.mass", torch.float64, batch, heads)
    gone = torch.tensor(left).unsqueeze(1)
    require("mass", (mass >= 0) & ((mass == 0) | (gone > 0)), "the squared norms of what has left")
    if not shape.clusters:
        return
    count = saved.take("totals.count", torch.int32, batch, heads, None)
    clusters = count.shape[2]
    require("count", torch.tensor(clusters <= shape.clusters + 1), f"at most {shape.clusters + 1} clusters")
    active = saved.take("totals.active", torch.int64, batch, heads)
    require("active", (active >= 0) & (active <= min(clusters, shape.clusters)), "how many clusters there are")
    there = torch.arange(clusters) < active.unsqueeze(-1)
    require("count", (count > 0) == there, "members of those that there are, and of no others")
    require("count (summed up)", count.long().sum(-1) == gone, "the tokens that have left")
    delta = saved.take("totals.delta", torch.float64, batch, heads)
    require("delta", delta >= 0, "a distance")
    saved.take("totals.representative", key.dtype, batch, heads, clusters, key.shape[3])
    saved.take("totals.sample", key.dtype, batch, heads, clusters, shape.members, key.shape[3])
