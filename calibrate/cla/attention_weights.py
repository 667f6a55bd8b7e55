"""The weights of one attention layer as matrices for `fit_group`, and back as parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...artifacts import KvcalError
from ...runtime.cla.projections import KEY_VALUE
from ...runtime.cla.sharing_map import SharingMap
from ..capture import LayerTensors
from .fitting import Fitted, LayerWeights

_OUTPUTS = ("o_proj", "out_proj", "dense")


def weights_of(model: Any, sharing_map: SharingMap) -> dict[int, AttentionWeights]:
    """Of every layer that is in a group with others.

    Raises:
        KvcalError: a map that does not fit the model, or a layer of another kind.
    """
    from ...runtime.integration.layer import full_attention_layers  # loads transformers
    from ...runtime.integration.support import attention_layers

    sharing_map.check(*full_attention_layers(model))
    seen = attention_layers(model)
    return {
        layer: AttentionWeights(layer, seen[layer].module, seen[layer].head_dim)
        for group in sharing_map.shared
        for layer in group
    }


class AttentionWeights:
    """Of a layer with separate projections, and nothing between those and the rotary embedding or the attention.

    Raises:
        KvcalError: another kind of layer, by what it has.
    """

    INSTEAD = "start from the mean of the projections (--pool mean)"

    def __init__(self, layer: int, attention: nn.Module, head_dim: int):
        children: dict[str, Any] = dict(attention.named_children())
        output = next((name for name in _OUTPUTS if name in children), "")
        self.names = ("q_proj", *KEY_VALUE, output)
        with_parameters = {name for name, child in children.items() if any(True for _ in child.parameters())}
        if with_parameters != set(self.names):
            raise KvcalError(
                f"{type(attention).__name__} (layer {layer}): projections are fitted where queries, keys, values and "
                f"outputs have one each and there is nothing else, this one has {', '.join(children)}: {self.INSTEAD}"
            )
        self.attention = attention
        self.query: nn.Linear = children["q_proj"]
        self.key: nn.Linear = children["k_proj"]
        self.value: nn.Linear = children["v_proj"]
        self.output: nn.Linear = children[output]
        for name, module in zip(self.names, (self.query, self.key, self.value, self.output), strict=True):
            if type(module) is not nn.Linear:
                raise KvcalError(
                    f"layer {layer}: {name} is a {type(module).__name__}, only plain linear layers can be fitted: "
                    "merge adapters first, load the model unquantised"
                )
        if (self.key.bias is None) != (self.value.bias is None):
            raise KvcalError(f"layer {layer}: only one of keys and values has a bias: {self.INSTEAD}")
        self.layer, self.kv_heads = layer, self.key.out_features // head_dim
        query_heads = self.query.out_features // head_dim
        self.value_dim = self.value.out_features // max(1, self.kv_heads)
        if not self.kv_heads or query_heads % self.kv_heads or self.output.in_features != query_heads * self.value_dim:
            sizes = ", ".join(f"{name} {tuple(children[name].weight.shape)}" for name in self.names)
            raise KvcalError(f"layer {layer}: {sizes} are not of heads of {head_dim} dimensions: {self.INSTEAD}")

    def parameters(self, *, stores: bool) -> dict[str, Tensor]:
        """Those that a fit changes, by their names in the attention module; keys and values of a storing layer only."""
        query, key, value, output = self.names
        modules = {query: self.query, **({key: self.key, value: self.value} if stores else {})}
        own = {
            f"{name}.{part}": tensor for name, module in modules.items() for part, tensor in module.named_parameters()
        }
        return {**own, f"{output}.weight": self.output.weight}

    def inputs(self, hidden: Tensor) -> Tensor:
        """[B, T, E] float32: what keys and values are linear in, with a 1 at the end where they have a bias."""
        hidden = hidden.float()
        return hidden if self.key.bias is None else torch.cat((hidden, torch.ones_like(hidden[..., :1])), -1)

    def check(self, inputs: Tensor, seen: LayerTensors) -> None:
        """Raise KvcalError where attention is handed something else than these projections give of its input.

        Args:
            inputs: of `inputs`.
        """
        for name, found in (("q_proj", seen.query_pre), ("k_proj", seen.key_pre), ("v_proj", seen.value)):
            projection: nn.Linear = getattr(self.attention, name)
            given = inputs[..., : projection.in_features] @ projection.weight.float().mT
            if projection.bias is not None:
                given = given + projection.bias.float()
            handed = found.transpose(1, 2).flatten(2).float()
            same = given.shape == handed.shape
            if same and name == "q_proj":  # some architectures scale queries here, not in the softmax
                given = given * ((given * handed).sum() / given.square().sum().clamp_min(1e-30))
            rounding = max(1e-4, 8 * torch.finfo(projection.weight.dtype).eps)
            if not same or (given - handed).abs().max() > rounding * handed.abs().max():
                raise KvcalError(
                    f"layer {self.layer}: what attention gets is not what {name} gives (clipped, gated or normed?): "
                    f"{self.INSTEAD}"
                )

    def matrices(self) -> LayerWeights:
        """In double precision on the CPU."""
        return LayerWeights(self._rows(self.key), self._rows(self.value), self._columns())

    def changed(self, fitted: Fitted, number: int) -> dict[str, Tensor]:
        """Parameters by their names in the attention module, in its dtype; keys and values for the storing layer, 0."""
        query_map, value_map = fitted.query_maps[number], fitted.value_maps[number]
        query, _, _, output = self.names
        made = {}
        for name, parameter in self.query.named_parameters():
            rows = _double(parameter).unflatten(0, (self.kv_heads, -1, query_map.shape[-1]))  # [Hkv, G, D] or […, E]
            made[f"{query}.{name}"] = torch.einsum("hcd,hgd...->hgc...", query_map, rows).flatten(0, 2)
        columns = self._columns() @ value_map.unsqueeze(1)  # [Hkv, G, E, Dv]
        made[f"{output}.weight"] = columns.permute(2, 0, 1, 3).flatten(1)
        if number == 0:
            for name, rows in zip(KEY_VALUE, (fitted.key.flatten(0, 1), fitted.value.flatten(0, 1)), strict=True):
                biased = self.key.bias is not None
                made[f"{name}.weight"] = rows[:, :-1] if biased else rows
                made |= {f"{name}.bias": rows[:, -1]} if biased else {}
        return {name: tensor.to(self.key.weight.dtype).contiguous() for name, tensor in made.items()}

    def _columns(self) -> Tensor:
        """[Hkv, G, E, Dv], of the output projection."""
        return _double(self.output.weight).unflatten(1, (self.kv_heads, -1, self.value_dim)).permute(1, 2, 0, 3)

    def _rows(self, projection: nn.Linear) -> Tensor:
        """[Hkv, D, E], the bias as the last column."""
        weight = _double(projection.weight)
        if projection.bias is not None:
            weight = torch.cat((weight, _double(projection.bias).unsqueeze(1)), 1)
        return weight.unflatten(0, (self.kv_heads, -1))


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double().cpu()
