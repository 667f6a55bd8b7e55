"""The compressed cache: a DynamicCache with a store of a method in every full-attention layer."""

from __future__ import annotations

import copy
import os
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ...artifacts import Artifact, KvcalError
from ..cla.method import check_methods, with_bases
from ..cla.sharing import sharing_of
from ..cla.sharing_map import SharingMap
from ..loading import check_model
from ..methods import KEEPING, Method
from ..planned import chosen, naming
from ..settings import builders, describe, methods_by_layer, name_of
from ..store import Store
from ..typed import MethodArgument, Settings
from ..wrapped import unwrapped
from .attachment import attach
from .layer import Call, CompressedLayer, Observer, full_attention_layers
from .reading import ReadingLayer
from .restoring import by_layer, check_fits, check_layers
from .rotation import refuse_change
from .routing import kind
from .snapshot import damaged, read_snapshot, write_snapshot
from .stock import restore_stock, stock_state
from .support import attention_layers

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Blueprint:
    """What every cache of a context is made from."""

    methods: Mapping[int, Method]
    builders: Mapping[int, Callable[[], Store]]
    artifact: Artifact | None
    layers: int
    """How many the model has."""
    groups: SharingMap = field(default_factory=lambda: SharingMap(()))
    """Which layers read the store of another; empty where none does."""
    sharing: str | None = None
    """`Sharing.identity` of the model; None: its layers share nothing."""

    @classmethod
    def of(cls, model: Any, artifact: Artifact | None, method: Any, settings: Mapping[str, Any]) -> Blueprint:
        check_artifact(artifact, model)
        head_dims = [layer.head_dim for layer in attention_layers(model)]
        layers, total = full_attention_layers(model)
        if not layers:
            warnings.warn(
                f"kvcal: no layer of {kind(model)} has full attention, and others are kept as they are: "
                "nothing is compressed",
                stacklevel=4,
            )
        sharing = sharing_of(model)
        groups = sharing.map if sharing else SharingMap(())
        named = chosen(artifact, method, settings, total)
        from_plan = isinstance(named, list) and named is not method
        if groups.shared and from_plan:
            raise KvcalError("the plan of this artifact is for layers that do not share: name a method, e.g. 'loki'")
        with naming(artifact if from_plan else None):
            methods = methods_by_layer(named, settings, layers, total, keys_are_shared=bool(groups.shared))
        fitted = artifact
        if sharing:
            check_methods(groups, methods, sharing.bases)
            if artifact is not None and sharing.bases is not None:
                fitted = with_bases(artifact, sharing.bases)
        storing = {layer: its_method for layer, its_method in methods.items() if groups.storing_of(layer) == layer}
        with naming(artifact if from_plan else None):
            made = builders(storing, head_dims, fitted)
        for group in groups.shared:
            if not methods[group[0]].keeps_all_tokens:
                raise KvcalError(
                    f"layers {', '.join(map(str, group))} share keys and values, and {name_of(methods[group[0]])} "
                    f"evicts tokens that the others still want: take a method that keeps every token ({KEEPING})"
                )
        return cls(methods, made, artifact, total, groups, sharing.identity if sharing else None)


class CompressedCache(DynamicCache):
    """Where transformers keeps keys and values, with a store of a method in every full-attention layer.

    Pass it as `past_key_values=`. A forward call of several tokens is prefill (dense attention), a call of
    one token on a cache that is not empty is a decoded step. Layers with a sliding window stay as they are.
    """

    def __init__(
        self,
        model: Any,
        artifact: Artifact | None = None,
        method: MethodArgument = None,
        **settings: Unpack[Settings],
    ) -> None:
        model = unwrapped(model)
        self._begin(model, Blueprint.of(model, artifact, method, settings))

    @classmethod
    def of(cls, model: Any, blueprint: Blueprint) -> CompressedCache:
        """An empty cache of a blueprint that was checked before."""
        cache = cls.__new__(cls)
        cache._begin(model, blueprint)
        return cache

    def _begin(self, model: Any, blueprint: Blueprint) -> None:
        super().__init__(config=model.config)
        if len(self.layers) != blueprint.layers:
            raise KvcalError(
                f"this model has {len(self.layers)} layers now and had {blueprint.layers} when it was compressed: "
                "early exit is not supported"
            )
        self.blueprint = blueprint
        self.check_sharing(model)
        self.call = Call(weakref.ref(model))
        stored = {layer: CompressedLayer(layer, build, self.call) for layer, build in blueprint.builders.items()}
        for stored_layer in stored.values():
            stored_layer.follow([stored[other] for other in stored_layer.store.policy.earlier])
        for layer in blueprint.methods:
            storing = blueprint.groups.storing_of(layer)
            is_storing = storing == layer
            self.layers[layer] = stored[layer] if is_storing else ReadingLayer(layer, stored[storing], self.call)
        attachment = attach(model)
        self._release = weakref.finalize(self, attachment.release)
        self.call.rotations = attachment.rotations

    @property
    def stores(self) -> dict[int, Store]:
        """By layer; layers with a sliding window have none, layers that share keys and values have the same one."""
        return {layer.layer_idx: layer.store for layer in self.layers if isinstance(layer, CompressedLayer)}

    @property
    def observer(self) -> Observer | None:
        """Called after the attention of every decoded token in every compressed layer, for measurements:
        (layer, store, query [B, Hq, 1, D], key [B, Hkv, 1, D], value, spec, output [B, Hq, 1, Dv])."""
        return self.call.observer

    @observer.setter
    def observer(self, observer: Observer | None) -> None:
        self.call.observer = observer

    def resident_bytes(self) -> int:
        """Bytes that the cache holds now, all layers and sequences, the slack of growing buffers included."""
        return sum(store.resident_bytes() for store in set(self.stores.values())) + self._stock_bytes()

    def bytes_read(self) -> int:
        """Bytes of the cache that the last decoded step read, all layers and sequences."""
        compressed = [layer for layer in self.layers if isinstance(layer, CompressedLayer)]
        return sum(layer.reading() for layer in compressed) + self._stock_bytes()

    def device_hits(self) -> tuple[int, int]:
        """Of an offloaded cache: (tokens read that lay on the device already, tokens read), of all heads and steps."""
        caches = [store.buffers.device_cache for store in set(self.stores.values())]
        hits = sum(cache.hits for cache in caches if cache)
        return hits, hits + sum(cache.misses for cache in caches if cache)

    def adopt(self, full: CompressedCache) -> None:
        """Start from the tokens of another cache of the same model, so that several caches share one prefill.

        Raises:
            KvcalError: this cache is not empty, the other does not keep all keys and values as they came (as `full`
                does), or lacks what a method needs (h2o: `record_mass=True`).
        """
        if full.call.model() is not self.call.model():
            raise KvcalError("adopt: that is a cache of another model")
        if full.blueprint.sharing != self.blueprint.sharing:
            raise KvcalError("adopt: in that cache other layers share keys and values than in this one")
        if self.get_seq_length():
            raise KvcalError("adopt: this cache holds tokens already: begin with an empty one")
        if not all(method.keeps_all_tokens for method in full.blueprint.methods.values()) or not all(
            store.policy.keeps_keys_values for store in full.stores.values()
        ):
            raise KvcalError("adopt: that cache does not keep keys and values as they came: give one of method full")
        if not full.get_seq_length():
            return
        self.call.length = full.call.length
        for layer, full_layer in zip(self.layers, full.layers, strict=True):
            if isinstance(layer, CompressedLayer):
                layer.adopt(full_layer)
            else:
                vars(layer).update(vars(full_layer))

    def make_room(self) -> None:
        """Let the methods that evict tokens do so now, as at the next decoded step, so that what is fed next, however
        many tokens at once, has no influence on it."""
        for store in set(self.stores.values()):
            store.make_room()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the cache, so that a long prompt is prefilled once; `load` continues from it."""
        self.check_length(self._longest())
        tensors: dict[str, Tensor] = {}
        for layer_idx, layer in enumerate(self.layers):
            state = _state(layer)
            tensors |= {f"layers.{layer_idx}.{name}": tensor for name, tensor in state.items()}
        blueprint = self.blueprint
        write_snapshot(folder, tensors, self.call.model(), blueprint.methods, blueprint.artifact, blueprint.groups)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], model: Any, artifact: Artifact | None = None) -> CompressedCache:
        """Continue from what `save` wrote, with the same model and artifact.

        Raises:
            KvcalError: not a saved cache, or of another model or artifact.
        """
        model = unwrapped(model)
        sharing = sharing_of(model)
        tensors, methods = read_snapshot(folder, model, artifact, sharing.map if sharing else SharingMap(()))
        try:
            cache = cls(model, artifact, methods or "full")  # none: all layers slide, none has a method
            states = by_layer(tensors, len(cache.layers))
            check_layers(cache.layers, states, artifact.layers if artifact else ())
            for layer, state in zip(cache.layers, states, strict=True):
                on_device = {name: tensor.to(model.device) for name, tensor in state.items()}
                if isinstance(layer, CompressedLayer):
                    layer.restore(on_device)
                else:
                    restore_stock(layer, on_device)
        except torch.OutOfMemoryError:
            raise
        except (KvcalError, LookupError, ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise damaged(folder, error) from error
        cache.call.length = cache._longest()
        return cache

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        check_fits(self.layers[layer_idx], layer_idx, key_states, value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedCache:
        """A cache of its own, so that one prompt can be continued several times; the artifact stays shared."""
        twin = CompressedCache.of(self.call.model(), self.blueprint)
        twin.call.recording, twin.call.speculates = self.call.recording, self.call.speculates
        twin.call.length = self.call.length
        for layer_idx, layer in enumerate(self.layers):
            if isinstance(layer, CompressedLayer):
                twin.layers[layer_idx].restore({name: tensor.clone() for name, tensor in _state(layer).items()})
                if layer.is_initialized and not isinstance(layer, ReadingLayer):
                    twin.layers[layer_idx].to(layer.device)
            else:
                twin.layers[layer_idx] = copy.deepcopy(layer, memo)
        return twin

    def check_sharing(self, model: Any) -> None:
        """Raises KvcalError when the model's layers share keys and values otherwise than when this was made."""
        now = sharing_of(model)
        if (now.identity if now else None) != self.blueprint.sharing:
            made, found = (
                f"in groups {groups}" if groups.shared else "in none"
                for groups in (self.blueprint.groups, now.map if now else SharingMap(()))
            )
            weights = ", with other weights" if made == found else ""
            raise KvcalError(
                f"this cache was made when layers shared keys and values {made}, now they share {found}{weights}: use "
                "it within the compress() or shared() of before"
            )

    def check_rotation(self, positions: Tensor | None, tokens: int) -> None:
        """Raises KvcalError when the next call, of so many tokens, would rotate keys otherwise than those held."""
        if self.call.rotations:
            length = self.get_seq_length() + tokens if positions is None else int(positions.max()) + 1
            self.check_length(length)
            self.call.length = length

    def check_length(self, length: int) -> None:
        """Raises KvcalError when the keys held are rotated otherwise than those of a sequence of `length` tokens."""
        if self.call.rotations and self.get_seq_length():
            refuse_change(self.call.rotations, self.call.model(), self.call.length, length)

    def check_whole(self) -> None:
        """Raises KvcalError when a forward call ended half-way through the layers."""
        seen = {store.seen for store in self.stores.values()}
        if len(seen) > 1:
            raise KvcalError(
                f"a forward call of this cache ended half-way, its layers hold {min(seen)} to {max(seen)} tokens: "
                "begin a new cache"
            )
        for layer in self.layers:
            if isinstance(layer, ReadingLayer):
                layer.check_whole()

    def activate_past_recording(self) -> None:
        if hasattr(DynamicCache, "activate_past_recording"):  # not in transformers 5.8
            super().activate_past_recording()
        self.call.recording = self.call.speculates = True

    def __repr__(self) -> str:
        return f"CompressedCache({self.get_seq_length()} tokens, {describe(self.blueprint.methods)})"

    def _longest(self) -> int:
        """Tokens of the longest sequence, without padding."""
        valid = next((store.valid for store in self.stores.values()), None)
        return self.get_seq_length() if valid is None else int(valid.sum(1).max())

    def _stock_bytes(self) -> int:
        stock = [layer for layer in self.layers if not isinstance(layer, CompressedLayer)]
        tensors = [tensor for layer in stock for tensor in (layer.keys, layer.values)]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def check_artifact(artifact: Artifact | None, model: Any) -> None:
    """Raises KvcalError: a file's name, or an artifact of another model."""
    if isinstance(artifact, (str, os.PathLike)):
        raise KvcalError(f"{artifact}: give a loaded artifact, kvcal.load({str(artifact)!r}), not its name")
    if artifact is not None:
        check_model(artifact, model)


def _state(layer: Any) -> dict[str, Tensor]:
    """The state of what a layer itself holds; {} for one that reads another layer's store."""
    if isinstance(layer, ReadingLayer):
        return {}
    return layer.store.state() if isinstance(layer, CompressedLayer) else stock_state(layer)
