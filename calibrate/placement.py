"""Models that lie on more than one device: loaded there, fed, and named by their whole weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..artifacts import KvcalError, weights_sha256
from ..artifacts.packages import require

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def device_map_options(device_map: str, max_memory: str | None, offload_folder: str) -> dict[str, Any]:
    """What `from_pretrained` takes to spread a model over GPUs, CPU memory and disk.

    Args:
        max_memory: comma list as "0=20GiB,1=20GiB,cpu=64GiB"; default: what accelerate finds free.
        offload_folder: for what neither GPUs nor CPU memory hold.

    Raises:
        KvcalError: accelerate is not installed, or an option it would not take.
    """
    if device_map not in DEVICE_MAPS:
        raise KvcalError(f"unknown device map {device_map!r}: give one of {', '.join(DEVICE_MAPS)}")
    require("accelerate", to=f"spread a model with --device-map {device_map}")
    options: dict[str, Any] = {"device_map": device_map, "offload_folder": offload_folder}
    if max_memory is not None:
        options["max_memory"] = _limits(max_memory)
    return options


def tensor_parallel_options(config: Any, world_size: int) -> dict[str, Any]:
    """What `from_pretrained` takes to deal a model's heads to the ranks.

    Raises:
        KvcalError: the architecture has no such plan, or the heads cannot be dealt evenly.
    """
    from transformers.distributed import DistributedConfig

    text = config.get_text_config()
    if not (getattr(text, "base_model_tp_plan", None) or {}):
        raise KvcalError(f"{text.model_type}: transformers has no tensor-parallel plan for it: use --device-map auto")
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if heads % world_size:
        raise KvcalError(
            f"--tp: {heads} KV heads cannot be dealt to {world_size} processes evenly: start as many as divide {heads}"
        )
    return {"distributed_config": DistributedConfig(tp_size=world_size, tp_plan="auto")}


def is_tensor_parallel(model: torch.nn.Module) -> bool:
    return any(_is_sharded(parameter) for parameter in model.parameters())


def input_device(model: Any) -> torch.device:
    """The device that token ids go to; for a model whose weights are offloaded, the one where they are used."""
    device: torch.device = model.device
    if device.type != "meta":
        return device
    for module in model.modules():
        place = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if place is not None:
            return torch.device(place)
    raise KvcalError("this model has no weights yet: load it with from_pretrained")


def whole_weights_sha256(model: torch.nn.Module) -> str:
    """`weights_sha256` of the model as its checkpoint has it, wherever the parts lie.

    Ranks of a tensor-parallel model call it together.
    """
    # Offloading takes tied weights apart, which are one parameter elsewhere.
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    parameters = dict(model.named_parameters())

    def whole(name: str, parameter: Tensor) -> Tensor | None:
        if _is_sharded(parameter):
            return parameter.full_tensor()  # type: ignore[attr-defined]
        if not parameter.is_meta:
            return parameter
        return None if tied.get(name) in parameters else _fetched(model, name)

    return weights_sha256(model, whole)


def _fetched(model: torch.nn.Module, name: str) -> Tensor:
    """A weight that accelerate keeps in CPU memory or on disk. Read only: putting it in place would untie weights."""
    owner, _, weight_name = name.rpartition(".")
    hook = getattr(model.get_submodule(owner), "_hf_hook", None)
    for single in getattr(hook, "hooks", [hook]):
        if getattr(single, "weights_map", None) is not None:
            weight: Tensor = single.weights_map[weight_name]
            return weight
    raise KvcalError(f"{name}: this model has no weights for it: load it with from_pretrained")


def _is_sharded(parameter: Tensor) -> bool:
    return hasattr(parameter, "full_tensor")


def _limits(text: str) -> dict[int | str, str]:
    limits: dict[int | str, str] = {}
    for part in text.split(","):
        device, equals, amount = (piece.strip() for piece in part.partition("="))
        if not equals or not amount or not (device.isdecimal() or device == "cpu"):
            raise KvcalError(f"--max-memory {text!r}: give amounts by device, e.g. 0=20GiB,1=20GiB,cpu=64GiB")
        limits[int(device) if device.isdecimal() else device] = amount
    return limits
