"""Where an attention layer projects keys and values, and modules that hand on what another layer projected."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...artifacts import KvcalError

KEY_VALUE = ("k_proj", "v_proj")
NORMS = ("k_norm", "k_layernorm", "key_layernorm", "v_norm")
"""What may come between a projection and the rotary embedding."""
QUERY = ("q_proj", "q_norm", "q_layernorm", "query_layernorm")
FUSED = ("qkv_proj", "query_key_value", "c_attn")
"""One projection of queries, keys and values: stacked in Phi-3 and (as a Conv1D) GPT-2, head by head in GPT-NeoX."""


class ThreadsInCall:
    """The threads that are in a forward call of a model, which began when its layers shared keys and values already."""

    def __init__(self) -> None:
        self._threads: set[int] = set()

    def begin(self) -> None:
        self._threads.add(this_thread())

    def end(self) -> None:
        self._threads.discard(this_thread())

    def now(self) -> bool:
        return this_thread() in self._threads


@torch.compiler.disable
def this_thread() -> int:
    return threading.get_ident()


class SharedOutput:
    """The output of a storing layer's module in this forward call, with its autograd graph; one for each thread."""

    def __init__(self, name: str, threads_in_call: ThreadsInCall):
        self.name, self._threads_in_call = name, threads_in_call
        self._outputs: dict[int, Tensor] = {}
        """By thread."""

    @property
    def output(self) -> Tensor | None:
        return self._outputs.get(this_thread())

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """A forward hook."""
        if not self._threads_in_call.now():
            raise KvcalError(
                f"{self.name} was called by itself, or in a call that began before layers shared keys and values: call "
                "the model"
            )
        self._outputs[this_thread()] = output

    def drop(self, *args: Any) -> None:
        """A forward hook, of the last layer that reads it."""
        self._outputs.pop(this_thread(), None)

    def take(self) -> Tensor:
        output = self.output
        if output is None:
            raise KvcalError(
                f"a layer that reads {self.name} was called by itself: layers that share keys and values work within "
                "a forward call of their model"
            )
        return output


class Read(nn.Module):
    """Replaces a reading layer's key or value projection, or its norm: gives what the storing layer's gave."""

    def __init__(self, source: SharedOutput):
        super().__init__()
        self.source = source

    def forward(self, *args: Any) -> Tensor:
        return self.source.take()


class ReadFused(nn.Module):
    """Replaces a reading layer's joint projection: gives its own queries with the storing layer's keys and values."""

    rows: Tensor
    """[Hq·D] int64: where queries are in the joint output."""

    def __init__(self, source: SharedOutput, projection: nn.Module, rows: Tensor):
        super().__init__()
        self.source = source
        self.transposed = isinstance(projection, Conv1D)
        part = {name: _query_part(projection, name, tensor, rows) for name, tensor in projection.named_parameters()}
        self.weight = nn.Parameter(part["weight"], requires_grad=False)
        self.bias = nn.Parameter(part["bias"], requires_grad=False) if "bias" in part else None
        self.register_buffer("rows", rows, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        query = F.linear(hidden, self.weight.T if self.transposed else self.weight, self.bias)
        return self.source.take().index_copy(-1, self.rows, query)


@dataclass(frozen=True)
class Projections:
    """The projections of one attention layer."""

    attention: nn.Module
    separate: tuple[str, ...]
    """Submodules that only keys and values go through."""
    fused: str | None
    """The submodule that projects everything."""
    rows: Tensor | None
    """[Hq·D] int64: where queries are in its output."""

    @classmethod
    def find(cls, layer: int, attention: nn.Module, config: Any) -> Projections:
        """Raises KvcalError: projections that are called or packed in a way that is not known."""
        children = dict(attention.named_children())
        fused = next((name for name in FUSED if name in children), None)
        if all(name in children for name in KEY_VALUE) and fused is None:
            projections = cls(attention, tuple(name for name in (*KEY_VALUE, *NORMS) if name in children), None, None)
        elif fused is not None and not any(name in children for name in (*KEY_VALUE, *NORMS)):
            projections = cls(attention, (), fused, _query_rows(fused, children[fused], config))
        else:
            raise KvcalError(
                f"{type(attention).__name__} (layer {layer}): no projections known by name to share, it has "
                f"{', '.join(children)}: this architecture cannot share keys and values"
            )
        for name in [fused] if fused else KEY_VALUE:
            projection = children[name]
            weight = getattr(projection, "weight", None)
            if type(projection) not in (nn.Linear, Conv1D) or weight is None or not weight.is_floating_point():
                raise KvcalError(
                    f"layer {layer}: {name} is a {type(projection).__name__}, only plain linear layers can be shared: "
                    "merge adapters first, load the model unquantised"
                )
        return projections

    def parameters(self) -> dict[str, Tensor]:
        """By name in the attention module, all that keys and values depend on."""
        modules = [self.fused] if self.fused else self.separate
        return {
            f"{module}.{name}": parameter
            for module in modules
            for name, parameter in self.attention.get_submodule(module).named_parameters()
        }

    def replacements(self, storing: Projections, outputs: dict[str, SharedOutput]) -> dict[str, nn.Module]:
        """Modules that make this layer read what `storing` keeps in `outputs`, by the names of those they replace."""
        if self.fused:
            assert self.rows is not None
            return {self.fused: ReadFused(outputs[self.fused], self.attention.get_submodule(self.fused), self.rows)}
        return {name: Read(outputs[name]) for name in self.separate}


def pooled(group: Sequence[Projections], names: Sequence[int], pool: str) -> dict[str, Tensor]:
    """New tensors for the storing layer's `parameters()`: the group's mean of what keys and values depend on.

    Args:
        group: the storing layer first.
        names: of the layers, for errors.
        pool: "mean", or "first": the storing layer's own.
    """
    by_layer = [layer.parameters() for layer in group]
    shapes = [{name: tensor.shape for name, tensor in parameters.items()} for parameters in by_layer]
    if different := [layer for layer, layer_shapes in zip(names, shapes, strict=True) if layer_shapes != shapes[0]]:
        raise KvcalError(
            f"layers {names[0]} and {different[0]} have projections of different shapes or biases: they cannot share"
        )
    storing, made = group[0], {}
    for name, parameter in by_layer[0].items():
        if pool == "first":
            made[name] = parameter.detach().clone()
            continue
        # In float64, where the mean of a few equal float32 numbers is that number.
        mean = torch.stack([parameters[name].detach().double() for parameters in by_layer]).mean(0)
        if storing.fused:
            assert storing.rows is not None
            dim = _output_dim(storing.attention.get_submodule(storing.fused), parameter)
            rows = storing.rows.to(parameter.device)
            mean = mean.index_copy(dim, rows, parameter.detach().double().index_select(dim, rows))
        made[name] = mean.to(parameter.dtype)
    return made


def _query_rows(name: str, projection: nn.Module, config: Any) -> Tensor:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    weight: Any = projection.weight
    rows = torch.arange(heads * head_dim, device=weight.device)
    if name == "query_key_value":  # [H, 3, D]
        rows = rows + 2 * head_dim * (rows // head_dim)
    return rows


def _output_dim(projection: nn.Module, parameter: Tensor) -> int:
    """The output dimension of a parameter; the weight of a Conv1D is transposed."""
    return 1 if isinstance(projection, Conv1D) and parameter.dim() == 2 else 0


def _query_part(projection: nn.Module, name: str, tensor: Tensor, rows: Tensor) -> Tensor:
    return tensor.detach().index_select(_output_dim(projection, tensor), rows.to(tensor.device))
