"""The weights of one attention layer as matrices for `fit_group`, and back as parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...artifacts import KvcalError
from ...runtime.cla.projections import KEY_VALUE, NORMS
from .fitting import Fitted, LayerWeights

_OUTPUTS = ("o_proj", "out_proj", "dense")


class AttentionWeights:
    """Of a layer with separate projections, and nothing between those and the rotary embedding or the attention.

    Raises:
        KvcalError: another kind of layer, by what it has.
    """

    INSTEAD = "start from the mean of the projections (--pool mean)"

    def __init__(self, layer: int, attention: nn.Module, config: Any):
        children: dict[str, Any] = dict(attention.named_children())
        output = next((name for name in _OUTPUTS if name in children), None)
        norms = [name for name in (*NORMS, "q_norm", "sub_norm") if name in children]
        if output is None or norms or not all(name in children for name in ("q_proj", *KEY_VALUE)):
            raise KvcalError(
                f"{type(attention).__name__} (layer {layer}): projections are fitted where queries, keys, values and "
                f"outputs have one of their own and no norm, this one has {', '.join(children)}: {self.INSTEAD}"
            )
        self.attention = attention
        self.query: nn.Linear = children["q_proj"]
        self.key: nn.Linear = children["k_proj"]
        self.value: nn.Linear = children["v_proj"]
        self.output: nn.Linear = children[output]
        self.names = ("q_proj", *KEY_VALUE, output)
        for name, module in zip(self.names, (self.query, self.key, self.value, self.output), strict=True):
            if type(module) is not nn.Linear:
                raise KvcalError(
                    f"layer {layer}: {name} is a {type(module).__name__}, only plain linear layers can be fitted: "
                    "merge adapters first, load the model unquantised"
                )
        if (self.key.bias is None) != (self.value.bias is None):
            raise KvcalError(f"layer {layer}: only one of keys and values has a bias: {self.INSTEAD}")
        self.heads = config.num_attention_heads
        self.kv_heads = getattr(config, "num_key_value_heads", None) or self.heads

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

    def matrices(self) -> LayerWeights:
        """In double precision on the CPU."""
        output = _double(self.output.weight)  # [E, Hq * Dv]
        return LayerWeights(
            self._rows(self.key),
            self._rows(self.value),
            output.unflatten(1, (self.kv_heads, -1, self._value_dim)).permute(1, 2, 0, 3),
        )

    def changed(self, fitted: Fitted, number: int) -> dict[str, Tensor]:
        """Parameters by their names in the attention module, in its dtype; keys and values for the storing layer, 0."""
        query_map, value_map = fitted.query_maps[number], fitted.value_maps[number]
        query, _, _, output = self.names
        made = {}
        for name, parameter in self.query.named_parameters():
            rows = _double(parameter).unflatten(0, (self.kv_heads, -1, query_map.shape[-1]))  # [Hkv, G, D] or […, E]
            made[f"{query}.{name}"] = torch.einsum("hcd,hgd...->hgc...", query_map, rows).flatten(0, 2)
        columns = self.matrices().output @ value_map.unsqueeze(1)  # [Hkv, G, E, Dv]
        made[f"{output}.weight"] = columns.permute(2, 0, 1, 3).flatten(1)
        if number == 0:
            for name, rows in zip(KEY_VALUE, (fitted.key.flatten(0, 1), fitted.value.flatten(0, 1)), strict=True):
                biased = self.key.bias is not None
                made[f"{name}.weight"] = rows[:, :-1] if biased else rows
                made |= {f"{name}.bias": rows[:, -1]} if biased else {}
        return {name: tensor.to(self.key.weight.dtype).contiguous() for name, tensor in made.items()}

    @property
    def _value_dim(self) -> int:
        return self.value.out_features // self.kv_heads

    def _rows(self, projection: nn.Linear) -> Tensor:
        """[Hkv, D, E], the bias as the last column."""
        weight = _double(projection.weight)
        if projection.bias is not None:
            weight = torch.cat((weight, _double(projection.bias).unsqueeze(1)), 1)
        return weight.unflatten(0, (self.kv_heads, -1))


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double().cpu()
