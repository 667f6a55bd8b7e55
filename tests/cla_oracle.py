"""Cross-layer attention by hooks that overwrite what reading layers project: none of kvcal's code but its groups."""

from __future__ import annotations

import copy
import gc
from typing import Any

import torch
from architectures import ARCHITECTURES, HEAD_DIM, HEADS, build
from compressed import traces

from kvcal.runtime.cla import SharingMap

SHAREABLE = {
    "gemma2": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "gemma3": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
}
"""Settings that give an architecture of `ARCHITECTURES` several layers with full attention."""
SHARING = {name: SHAREABLE.get(name, {}) for name in ARCHITECTURES if name != "mistral-window"}
GROUPS = {name: "0+2" if name in SHAREABLE else "0-1,2" for name in SHARING}
WHOLE = {name: "0+2" if name in SHAREABLE else "0-2" for name in SHARING}


def layers_of(model: Any) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__.endswith("Attention")]


def oracle(model: Any, groups: list[list[int]], name: str, pool: str = "mean") -> Any:
    """A copy of the model in which the layers of each group attend to the keys and values of its first."""
    made = copy.deepcopy(model)
    layers, originals = layers_of(made), layers_of(model)
    architecture = ARCHITECTURES[name]
    for group in groups:
        kept: dict[str, torch.Tensor] = {}
        parts = [architecture.projection] if architecture.split else ["k_proj", "v_proj", "k_norm"]
        for part in parts:
            if not hasattr(layers[group[0]], part):
                continue
            for key, _ in getattr(layers[group[0]], part).named_parameters():
                of = [getattr(getattr(originals[layer], part), key).detach() for layer in group]
                mean = sum(of) / len(of) if pool == "mean" else of[0]
                for layer in group if part == "k_norm" else group[:1]:
                    value = mean
                    if architecture.split:  # [out] or [out, in]; GPT-2 has its weights the other way round
                        turned = name == "gpt2" and mean.dim() == 2
                        pair = [each.T if turned else each for each in (of[0], mean)]
                        value = joined(name, own=pair[0], others=pair[1])
                        value = value.T if turned else value
                    with torch.no_grad():
                        getattr(getattr(layers[layer], part), key).copy_(value)
            if part == "k_norm":
                continue
            getattr(layers[group[0]], part).register_forward_hook(
                lambda module, args, output, part=part, kept=kept: kept.update({part: output})
            )
            for layer in group[1:]:
                getattr(layers[layer], part).register_forward_hook(
                    lambda module, args, output, part=part, kept=kept: (
                        joined(name, output.movedim(-1, 0), kept[part].movedim(-1, 0)).movedim(0, -1)
                        if architecture.split
                        else kept[part]
                    )
                )
    return made


def joined(name: str, own: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Rows (the first dimension) of queries from `own`, of keys and values from `others`."""
    if name == "gpt-neox":
        mine, theirs = (each.unflatten(0, (HEADS, 3, HEAD_DIM)) for each in (own, others))
        return torch.cat((mine[:, :1], theirs[:, 1:]), 1).flatten(0, 2)
    queries = HEADS * HEAD_DIM
    return torch.cat((own[:queries], others[queries:]))


def several(name: str, **other: Any) -> Any:
    """A model with several layers of full attention, its embeddings nowhere zero."""
    made = build(name, **{**SHARING[name], **other})
    torch.nn.init.normal_(made.get_input_embeddings().weight[0], std=0.02)
    return made


def groups_of(text: str) -> list[list[int]]:
    return [list(group) for group in SharingMap.parse(text).groups]


def inventory(of: Any) -> Any:
    """Every module, parameter and buffer by identity, whether it is trained, and all hooks."""
    gc.collect()  # caches of other models that are left in cycles would leave transformers' registries in between
    tensors = {name: (id(p), p.requires_grad, p._version) for name, p in of.named_parameters(remove_duplicate=False)}
    modules = {name: (id(module), list(module._modules)) for name, module in of.named_modules()}
    always = [list(module._forward_hooks_always_called) for module in of.modules()]
    return tensors, modules, always, traces(of), sorted(vars(of))
