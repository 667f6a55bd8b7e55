"""Time of a whole model's decode step: random weights, random keys, the step that `runtime.decode` captures."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvcal.runtime.methods.basis import Basis
from kvcal.runtime.methods.full import Full
from kvcal.runtime.methods.loki import LokiPolicy
from kvcal.runtime.replay import Replay, State
from kvcal.runtime.sampling import Sampler
from kvcal.runtime.settings import new_store
from kvcal.runtime.store import Store

from .attention_steps import cluster_settings, loki_settings
from .caches import fill_clustered, fill_pages
from .codebook import fitted, settings
from .sizes import SPECTRAL, Sizes
from .timing import tidy

Row = dict[str, Any]
WARM = 4
RESERVED = 8 << 30
"""Bytes left free beside weights and caches: workspaces, logits, a graph's own memory."""
SLACK = 1.1
"""What a method keeps beside keys and values, at most, as a factor."""


def build_model(sizes: Sizes, device: torch.device) -> Any:
    """In eval mode, its weights drawn on the device."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(sizes.config(max(sizes.lengths)), dtype=sizes.dtype)
    return model.to(device).eval()


def fitting(sizes: Sizes, length: int, device: torch.device) -> int:
    """Rows of so many tokens for which there is memory beside the model."""
    if device.type != "cuda":
        return 2
    tidy(device)
    row = sizes.layers * sizes.heads * length * 2 * sizes.dims * sizes.itemsize * SLACK
    return max(1, int((torch.cuda.mem_get_info(device)[0] - RESERVED) / row))


@torch.no_grad()
def step_time(model: Any, sizes: Sizes, length: int, batch: int, name: str) -> Row:
    """Steps at `length` tokens held: the cache is full of random keys and values rather than prefilled."""
    from kvcal.runtime.integration.stepping import SteppingCache

    cache = made_cache(model, sizes, length - sizes.spare, batch, name)
    stepping = SteppingCache(cache)
    position = torch.full((batch, 1), length - sizes.spare, dtype=torch.int64, device=model.device)
    state = State(position, sizes.spare, Sampler(), None, 0, seed=0)

    def step() -> None:
        out = model(
            input_ids=state.ids, position_ids=state.position, past_key_values=stepping, use_cache=True, logits_to_keep=1
        )
        state.position += 1
        stepping.clock.tick()
        state.take(out.logits[:, -1])

    replay = Replay(step, stepping.changed, state, True, stepping.clock.reset)
    gpu = model.device.type == "cuda"
    events = []
    for _ in range(sizes.spare - 1):
        replay(stepping.prepare())
        stepping.unsettled += 1
        if gpu:
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()
    row: Row = {"why_not_captured": replay.why_not, "cache_bytes": cache.resident_bytes()}
    if gpu:
        torch.cuda.synchronize()
        if not bool(state.tokens.lt(sizes.vocabulary).all()):
            raise RuntimeError("a sampled token is none of the vocabulary")
        steps = [one.elapsed_time(other) for one, other in zip(events[WARM:], events[WARM + 1 :], strict=False)]
        row |= {"ms": statistics.median(steps), "tokens_per_s": 1000 * batch / statistics.median(steps)}
    return row


def made_cache(model: Any, sizes: Sizes, held: int, batch: int, name: str) -> Any:
    """A CompressedCache of `held` tokens a row, with room for those of the steps."""
    from kvcal.runtime.integration.cache import Blueprint, CompressedCache

    generator = torch.Generator(model.device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=model.device, dtype=sizes.dtype)

    method = method_of(sizes, name)
    square = torch.randn(sizes.heads, sizes.dims, sizes.dims, generator=generator, device=model.device)
    components = torch.linalg.qr(square)[0].cpu()
    layers = range(sizes.layers)
    if name == "loki":  # without an artifact to take its basis from
        policy = LokiPolicy(method, Basis(components, components, sizes.rank))
        builders: dict[int, Any] = dict.fromkeys(layers, lambda: Store(policy))
    else:
        artifact = fitted(sizes, components, len(layers))
        builders = {layer: partial(new_store, method.bind(layer, sizes.dims, artifact)) for layer in layers}
    blueprint = Blueprint(dict.fromkeys(layers, method), builders, None, len(layers))
    cache = CompressedCache.of(model, blueprint)
    for store in cache.stores.values():
        shape = batch, sizes.heads, held, sizes.dims
        key, value = normal(*shape), normal(*shape)
        if name.startswith("clusterkv"):
            fill_clustered(store, key, value, sizes)
        else:
            fill_pages(store, key, value)
    return cache


def method_of(sizes: Sizes, name: str) -> Any:
    """Of the names that a table shows: "full", "loki", "clusterkv 80"."""
    kind, _, per_cluster = name.partition(" ")
    if kind == "clusterkv":
        return cluster_settings(sizes, int(per_cluster))
    if name in SPECTRAL:
        return settings(sizes, name)
    return {"full": Full(), "loki": loki_settings(sizes, "pca")}[name]
