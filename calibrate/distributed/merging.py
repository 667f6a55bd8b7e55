"""The statistics of all ranks as one, in float64 and in an order that depends on the number of ranks alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from ...artifacts import KvcalError
from ..statistics import StatisticsFitter
from .world import World


def merge_tokens(statistics: StatisticsFitter, world: World) -> StatisticsFitter:
    """For ranks that saw different tokens: the statistics of all tokens, on every rank.

    Pairs of ranks merge, then pairs of pairs, up to rank 0, which hands the result to all. Reservoirs come out as one
    process would have them; moments to the last bits of float64, since sums are added in another order.
    """
    step = 1
    while step < world.size:
        if world.rank % (2 * step):
            world.send(world.rank - step, f"merge {step}", *statistics.state())
            break
        if world.rank + step < world.size:
            state = world.receive(world.rank + step, f"merge {step}")
            statistics.merge(StatisticsFitter.from_state(statistics.reservoir, statistics.seed, *state))
        step *= 2
    if world.size == 1:
        return statistics
    state = world.broadcast(*statistics.state())
    return StatisticsFitter.from_state(statistics.reservoir, statistics.seed, *state)


def join_heads(statistics: StatisticsFitter, world: World, fingerprint: Mapping[str, Any]) -> StatisticsFitter:
    """For ranks that saw the same tokens in different KV heads, rank 0 the first of them: all heads, on every rank.

    Args:
        fingerprint: of the whole model.

    Raises:
        KvcalError: the layers' heads are not dealt evenly to the ranks.
    """
    if world.size == 1:
        return statistics
    kv_heads = fingerprint["num_key_value_heads"] or fingerprint["num_attention_heads"]
    numbers, tensors = statistics.state()
    for layer in statistics.layers.values():
        if layer.kv_heads * world.size != kv_heads:
            raise KvcalError(
                f"layer {layer.index}: {layer.kv_heads} of {kv_heads} KV heads on each of {world.size} ranks: this "
                "model's tensor-parallel plan does not deal its heads evenly: run it without --tp"
            )
    numbers["layers"] = [
        dataclasses.asdict(
            dataclasses.replace(layer, kv_heads=layer.kv_heads * world.size, query_heads=layer.query_heads * world.size)
        )
        for layer in statistics.layers.values()
    ]
    joined = {
        name: tensor if name == "token" else torch.cat(world.all_gather(tensor.cpu()))
        for name, tensor in tensors.items()
    }
    return StatisticsFitter.from_state(statistics.reservoir, statistics.seed, numbers, joined)
