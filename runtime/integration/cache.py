"""The compressed cache: a DynamicCache with a store of a method in every full-attention layer."""

from __future__ import annotations

import copy
import os
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from ...artifacts import Artifact, KvcalError
from ..loading import check_model
from ..settings import DEFAULT_METHOD, builders, describe, plan
from ..stores import Method, Store
from ..stores.clusterkv import ClusterKVStore
from ..stores.full import Full
from .attachment import attach
from .layer import Call, CompressedLayer, Observer, restore_stock, stock_state
from .routing import kind
from .snapshot import damaged, read_snapshot, write_snapshot


@dataclass(frozen=True)
class Recipe:
    """What every cache of a context is made from."""

    methods: Mapping[int, Method]
    builders: Mapping[int, Callable[[], Store]]
    artifact: Artifact | None
    layers: int
    """Of the model."""

    @classmethod
    def of(cls, model: Any, artifact: Artifact | None, method: Any, settings: Mapping[str, Any]) -> Recipe:
        if isinstance(artifact, (str, os.PathLike)):
            raise KvcalError(f"{artifact}: give a loaded artifact, kvcal.runtime.load({str(artifact)!r}), not its name")
        if artifact is not None:
            check_model(artifact, model)
        config = model.config.get_text_config()
        stock = DynamicCache(config=model.config).layers
        layers = [index for index, layer in enumerate(stock) if type(layer) is DynamicLayer]
        if not layers:
            warnings.warn(
                f"kvcal: no layer of {kind(model)} has full attention, and others are kept as they are: "
                "nothing is compressed",
                stacklevel=4,
            )
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        methods = plan(method, settings, layers, len(stock))
        made = builders(methods, [head_dim] * len(stock), artifact)
        return cls(methods, made, artifact, len(stock))


class CompressedCache(DynamicCache):
    """Where transformers keeps keys and values, with a store of a method in every full-attention layer.

    Pass it as `past_key_values=`. A forward call of several tokens is prefill (dense attention), a call of
    one token on a cache that is not empty is a decoded step. Layers with a sliding window stay as they are.
    """

    def __init__(
        self, model: Any, artifact: Artifact | None = None, method: Any = DEFAULT_METHOD, **settings: Any
    ) -> None:
        self._begin(model, Recipe.of(model, artifact, method, settings))

    @classmethod
    def of(cls, model: Any, recipe: Recipe) -> CompressedCache:
        """An empty cache of a recipe that was checked before."""
        cache = cls.__new__(cls)
        cache._begin(model, recipe)
        return cache

    def _begin(self, model: Any, recipe: Recipe) -> None:
        super().__init__(config=model.config)
        if len(self.layers) != recipe.layers:
            raise KvcalError(
                f"this model has {len(self.layers)} layers now and had {recipe.layers} when it was compressed: early "
                "exit is not supported"
            )
        self.recipe = recipe
        self.call = Call(weakref.ref(model))
        for layer, build in recipe.builders.items():
            self.layers[layer] = CompressedLayer(layer, build, self.call)
        self._release = weakref.finalize(self, attach(model).release)

    @property
    def stores(self) -> dict[int, Store]:
        """By layer; layers with a sliding window have none."""
        return {index: layer.store for index, layer in enumerate(self.layers) if isinstance(layer, CompressedLayer)}

    @property
    def observer(self) -> Observer | None:
        """Called after the attention of every decoded token in every compressed layer, for measurements:
        (layer, store, query [B, Hq, 1, D], key [B, Hkv, 1, D], value, logits, output [B, Hq, 1, Dv])."""
        return self.call.observer

    @observer.setter
    def observer(self, observer: Observer | None) -> None:
        self.call.observer = observer

    def resident_bytes(self) -> int:
        """Bytes that the cache holds now, all layers and rows, the slack of growing buffers included."""
        return sum(store.resident_bytes() for store in self.stores.values()) + self._stock_bytes()

    def bytes_read(self) -> int:
        """Bytes of the cache that the last decoded step read, all layers and rows."""
        return sum(store.bytes_read() for store in self.stores.values()) + self._stock_bytes()

    def device_hits(self) -> tuple[int, int]:
        """Of an offloaded cache: (tokens read that lay on the device already, tokens read), of all heads and steps."""
        found = [store.device_cache for store in self.stores.values() if isinstance(store, ClusterKVStore)]
        hits = sum(cache.hits for cache in found if cache)
        return hits, hits + sum(cache.misses for cache in found if cache)

    def adopt(self, full: CompressedCache) -> None:
        """Start from the tokens of a `full` cache of the same model, so that several caches share one prefill.

        Raises:
            KvcalError: this cache is not empty, the other is not `full`, or it lacks what a method needs (h2o:
                `record_mass=True`).
        """
        if full.call.model() is not self.call.model():
            raise KvcalError("adopt: that is a cache of another model")
        if self.get_seq_length() or any(not isinstance(method, Full) for method in full.recipe.methods.values()):
            raise KvcalError("adopt: an empty cache can take over a cache of method full, nothing else")
        if not full.get_seq_length():
            return
        for layer, other in zip(self.layers, full.layers, strict=True):
            if isinstance(layer, CompressedLayer):
                layer.adopt(other)
            else:
                vars(layer).update(vars(other))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the cache, so that a long prompt is prefilled once; `load` continues from it."""
        tensors: dict[str, Tensor] = {}
        for index, layer in enumerate(self.layers):
            state = layer.store.state() if isinstance(layer, CompressedLayer) else stock_state(layer)
            tensors |= {f"layers.{index}.{name}": tensor for name, tensor in state.items()}
        write_snapshot(folder, tensors, self.call.model(), self.recipe.methods, self.recipe.artifact)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], model: Any, artifact: Artifact | None = None) -> CompressedCache:
        """Continue from what `save` wrote, with the same model and artifact.

        Raises:
            KvcalError: not a saved cache, or of another model or artifact.
        """
        tensors, methods = read_snapshot(folder, model, artifact)
        try:
            cache = cls(model, artifact, methods or DEFAULT_METHOD)  # none: all layers slide, none has a method
            for index, layer in enumerate(cache.layers):
                prefix = f"layers.{index}."
                state = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
                if isinstance(layer, CompressedLayer):
                    layer.restore(state)
                else:
                    restore_stock(layer, state)
        except (KvcalError, LookupError, ValueError, RuntimeError) as error:
            raise damaged(folder, error) from error
        return cache

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedCache:
        """A cache of its own, so that one prompt can be continued several times; the artifact stays shared."""
        twin = CompressedCache.of(self.call.model(), self.recipe)
        twin.call.recording, twin.call.speculates = self.call.recording, self.call.speculates
        for index, layer in enumerate(self.layers):
            if isinstance(layer, CompressedLayer):
                twin.layers[index].restore({name: tensor.clone() for name, tensor in layer.store.state().items()})
            else:
                twin.layers[index] = copy.deepcopy(layer, memo)
        return twin

    def check_whole(self) -> None:
        """Raises KvcalError when a forward call ended half-way through the layers."""
        seen = {store.seen for store in self.stores.values()}
        if len(seen) > 1:
            raise KvcalError(
                f"a forward call of this cache ended half-way, its layers hold {min(seen)} to {max(seen)} tokens: "
                "begin a new cache"
            )

    def activate_past_recording(self) -> None:
        if hasattr(DynamicCache, "activate_past_recording"):  # not in transformers 5.8
            super().activate_past_recording()
        self.call.recording = self.call.speculates = True

    def __repr__(self) -> str:
        return f"CompressedCache({self.get_seq_length()} tokens, {describe(self.recipe.methods)})"

    def _stock_bytes(self) -> int:
        stock = [layer for layer in self.layers if not isinstance(layer, CompressedLayer)]
        tensors = [tensor for layer in stock for tensor in (layer.keys, layer.values)]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)
