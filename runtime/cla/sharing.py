"""Cross-layer attention in a loaded model (Brandon et al., 2024): reading layers get what their group's storing layer
projects, and project no keys and values of their own.

It happens at the projections, so it holds for every attention implementation, cache and pass: a forward hook keeps
the storing layer's output until the last layer of its group has read it (or the model's forward call ends, by an
exception), and parameter-free modules in the reading layers hand it on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...artifacts import KvcalError
from ...artifacts.weights import sample
from ..integration.attachment import attach
from ..integration.entering import Entry
from ..integration.implementations import LOCK
from ..integration.layer import full_attention_layers
from ..integration.routing import backbone
from ..integration.support import find_attention
from ..methods.amounts import check_choice
from ..wrapped import unwrapped
from .checks import check_equal, fitting, refuse_checkpointing, refuse_tied
from .projections import QUERY, Projections, SharedOutput, ThreadsInCall, pooled
from .sharing_map import SharingMap

POOLS = ("mean", "first")
TRAINABLE = ("none", "shared", "attention", "all")
_ATTRIBUTE = "_kvcal_sharing"


class Sharing:
    """A model whose layers share keys and values, until `remove()`. Made by `share`."""

    def __init__(self, model: Any, sharing_map: SharingMap, entry: Entry | None = None):
        self.map = sharing_map
        self._entry = entry
        self.parameters: dict[str, nn.Parameter] = {}
        """All that replaced a parameter of the model, by its name in `model.named_parameters()`."""
        self.bases: Mapping[str, Tensor] | None = None
        """Bases of the shared keys that methods read instead of those of the artifact's stage `pca`, by the names
        there; None: the artifact is of the shared model itself."""
        self.identity: str | None = None
        """Tells sharings apart, by groups and weights; None: nothing is shared or replaced."""
        self._model = model
        self._kept = False
        self._shared_outputs: list[SharedOutput] = []
        self._threads_in_call = ThreadsInCall()
        self._hooks: list[Any] = []
        self._replaced: list[tuple[MutableMapping[str, Any], str, Any]] = []
        self._flags: list[tuple[nn.Parameter, bool]] = []

    def keep(self) -> None:
        """Share for good: what was replaced is let go, and `remove()` is refused."""
        self._kept, self._replaced = True, []

    def remove(self) -> None:
        """Leave the model as it was found: the same modules and parameters, and whether they are trained.

        Raises:
            KvcalError: after `keep()`.
        """
        self._refuse_kept()
        for hook in self._hooks:
            hook.remove()
        for place, name, before in reversed(self._replaced):
            place[name] = before
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        self._drop()
        self._hooks, self._replaced, self._flags = [], [], []
        if sharing_of(self._model) is self:
            delattr(self._model, _ATTRIBUTE)

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Inside, the model computes what it did before: e.g. a teacher's logits between training steps.

        Raises:
            KvcalError: after `keep()`.
        """
        self._refuse_kept()
        inside = [(place, name, place[name]) for place, name, _ in self._replaced]
        for place, name, before in reversed(self._replaced):
            place[name] = before
        delattr(self._model, _ATTRIBUTE)
        try:
            yield
        finally:
            for place, name, replacement in inside:
                place[name] = replacement
            setattr(self._model, _ATTRIBUTE, self)

    def _refuse_kept(self) -> None:
        if self._kept:
            raise KvcalError("this model's layers share keys and values for good: load the original model instead")

    def _install(self, attentions: list[nn.Module], pool: str) -> dict[str, Tensor]:
        """Install hooks and stand-in modules.

        Returns:
            New tensors by the names of the parameters that they are to replace, or that stand-in modules have.
        """
        names = {module: name for name, module in self._model.named_modules()}
        config = self._model.config.get_text_config()
        values: dict[str, Tensor] = {}
        for group in self.map.shared:
            projections = [Projections.find(layer, attentions[layer], config) for layer in group]
            storing = projections[0]
            prefix = names[storing.attention]
            values |= {f"{prefix}.{name}": tensor for name, tensor in pooled(projections, group, pool).items()}
            outputs = {}
            for name in [storing.fused] if storing.fused else storing.separate:
                outputs[name] = SharedOutput(f"{prefix}.{name}", self._threads_in_call)
                self._hooks.append(storing.attention.get_submodule(name).register_forward_hook(outputs[name].keep))
            # Hooks of the attention, not of the stand-in, which the calibration pass calls twice.
            self._hooks += [attentions[group[-1]].register_forward_hook(source.drop) for source in outputs.values()]
            self._shared_outputs += outputs.values()
            for reading in projections[1:]:
                for name, module in reading.replacements(storing, outputs).items():
                    self._put(reading.attention._modules, name, module.train(reading.attention.training))
                    place = f"{names[reading.attention]}.{name}"
                    values |= {f"{place}.{key}": tensor.detach() for key, tensor in module.named_parameters()}
        if self._shared_outputs:
            part = backbone(self._model)
            self._hooks.append(part.register_forward_pre_hook(self._before))
            self._hooks.append(part.register_forward_hook(self._drop, always_call=True))
        return values

    def _replace(self, values: Mapping[str, Tensor]) -> None:
        """Put new parameters in the place of the model's; of a tied one, in all its places."""
        places: dict[int, list[tuple[MutableMapping[str, Any], str]]] = {}
        for module in self._model.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    places.setdefault(id(parameter), []).append((module._parameters, key))
        named = dict(self._model.named_parameters())
        for name, value in values.items():
            self.parameters[name] = nn.Parameter(value, requires_grad=False)
            for place, key in places[id(named[name])]:
                self._put(place, key, self.parameters[name])

    def _train(self, trained: set[str]) -> None:
        for parameter in self._model.parameters():
            self._flags.append((parameter, parameter.requires_grad))
            parameter.requires_grad_(False)
        for name in trained:
            self.parameters[name].requires_grad_(True)

    def _put(self, place: MutableMapping[str, Any], name: str, new: Any) -> None:
        self._replaced.append((place, name, place[name]))
        place[name] = new

    def _before(self, *args: Any) -> None:
        if torch.is_grad_enabled() and self._model.training:
            refuse_checkpointing(self._model)
        if self._entry is not None and not self._entry.includes_caller():
            raise KvcalError(
                f"layers of this model share keys and values in {self._entry.thread.name}: wait until it has left, or "
                "use a copy of the model"
            )
        self._threads_in_call.begin()

    def _drop(self, *args: Any) -> None:
        self._threads_in_call.end()
        for source in self._shared_outputs:
            source.drop()


def share(
    model: Any,
    sharing_map: SharingMap,
    *,
    pool: str = "mean",
    weights: Mapping[str, Tensor] | None = None,
    trainable: str = "none",
) -> Sharing:
    """Let the layers of each group share the keys and values of its first, until `remove()` of what is returned.

    A group of one layer is left untouched. The model's own parameters are never written to.

    Args:
        model: a transformers decoder.
        pool: "mean": the projections of keys and values (and their norms) of a group are averaged, what the paper
            found better; "first": the storing layer keeps its own.
        weights: values for parameters of the shared model, by name, instead of pooled or the model's own.
        trainable: "shared": gradients reach the shared projections and the queries and norms of the reading layers,
            nothing else (where one projection makes queries, too, the storing layer's go with it); "attention": every
            layer's attention, and all norms; "all": copies of all parameters; "none": nothing of what is replaced.

    Raises:
        KvcalError: a model or map that cannot share, with the reason; the model is then as it was.
    """
    return share_for(None, model, sharing_map, pool, weights, trainable)


def share_for(
    entry: Entry | None,
    model: Any,
    sharing_map: SharingMap,
    pool: str,
    weights: Mapping[str, Tensor] | None,
    trainable: str = "none",
) -> Sharing:
    """`share` for the calls of one thread and task; those of others are refused."""
    check_choice("pool", pool, POOLS)
    check_choice("trainable", trainable, TRAINABLE)
    with LOCK:  # two threads would take each other's stand-ins for the model's own modules
        return _shared(entry, unwrapped(model), sharing_map, pool, weights, trainable)


def _shared(
    entry: Entry | None,
    model: Any,
    sharing_map: SharingMap,
    pool: str,
    weights: Mapping[str, Tensor] | None,
    trainable: str,
) -> Sharing:
    if (already := sharing_of(model)) is not None:
        raise KvcalError(
            f"this model's layers share keys and values already ({already.map}): remove that sharing first"
        )
    attachment = attach(model)  # a cache that is collected meanwhile would take its routing away from the calls below
    sharing = Sharing(model, sharing_map, entry)
    try:
        attentions = find_attention(model)
        sharing_map.check(*full_attention_layers(model))
        if sharing_map.shared:
            refuse_checkpointing(model)
        values = sharing._install(attentions, pool)
        named = dict(model.named_parameters())
        trained = _trained(model, sharing_map, attentions, trainable, set(values))
        refuse_tied(model, trained if trainable in ("shared", "attention") else set(values))
        values |= {name: named[name].detach().clone() for name in sorted(trained - values.keys())}
        values |= fitting(weights or {}, named)
        sharing._replace(values)
        if trainable != "none":
            sharing._train(trained)
        check_equal(model, sharing_map)
        if sharing.parameters:
            digest = hashlib.sha256(f"{sharing_map} {sample(sharing.parameters.items())}".encode())
            sharing.identity = digest.hexdigest()
    except BaseException:
        sharing.remove()
        raise
    finally:
        attachment.release()
    setattr(model, _ATTRIBUTE, sharing)
    return sharing


@contextmanager
def shared(
    model: Any,
    sharing_map: SharingMap,
    *,
    pool: str = "mean",
    weights: Mapping[str, Tensor] | None = None,
    trainable: str = "none",
) -> Iterator[Sharing]:
    """`share` for the length of the context."""
    sharing = share(model, sharing_map, pool=pool, weights=weights, trainable=trainable)
    try:
        yield sharing
    finally:
        sharing.remove()


def sharing_of(model: Any) -> Sharing | None:
    """How the layers of a model share keys and values now; a deep copy of a shared model is shared, too."""
    return vars(unwrapped(model)).get(_ATTRIBUTE)


def _trained(
    model: Any, sharing_map: SharingMap, attentions: list[nn.Module], trainable: str, replaced: set[str]
) -> set[str]:
    """Names of the parameters that gradients are to reach."""
    if trainable in ("none", "all"):
        return set() if trainable == "none" else {name for name, _ in model.named_parameters()}
    named = dict(model.named_parameters(remove_duplicate=False))  # tied ones under every name, to be refused
    modules = {module: name for name, module in model.named_modules()}
    norms = {name for module, name in modules.items() if _is_norm(module)}
    if trainable == "attention":
        whole = {modules[attention] for attention in attentions} | norms
        return {name for name in named if any(name.startswith(f"{part}.") for part in whole)}
    own = {f"{modules[attentions[layer]]}.{name}" for layer in sharing_map.reading for name in QUERY}
    blocks = [modules[attentions[layer]].rpartition(".")[0] for layer in sharing_map.reading]
    own |= {name for name in norms if any(name.startswith(f"{block}.") for block in blocks)}
    return replaced | {name for name in named if name.rpartition(".")[0] in own}


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.lower().endswith("norm")
