"""Everything that a model's output depends on beside its architecture, by name, and a hash over it.

Not all of it is parameters: quantised models keep integers, scales and zero points in buffers, packed objects or
subclasses of tensors, and adapters have strengths that are plain numbers.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from io import BytesIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .errors import KvcalError

_PIECE = 1 << 24
"""Numbers hashed at a time: an embedding of a large model in float32 is several GB."""
_ADAPTER = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
"""What PEFT's layers add to their parameters."""
_WRAPPED = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
_PLAIN = {Tensor, nn.Parameter, getattr(nn, "Buffer", Tensor)}
Whole = Callable[[str, Tensor], "Tensor | None"]


@torch.no_grad()
def weights_sha256(model: nn.Module, whole: Whole | None = None) -> str:
    """sha256 over everything `model_state` lists, in ascending order of name.

    Floating point numbers count as float32: a bf16 checkpoint has one hash loaded as bf16 or as float32. A dtype that
    rounds the checkpoint (float32 weights loaded as bf16) is other weights, and another hash; so is a quantised form.

    Args:
        whole: (name, parameter or buffer) -> the whole of it, where the model here holds a part of it or none; None
            for one that is the same as another.

    Raises:
        KvcalError: weights that are not there (meta device), or of a kind that cannot be read.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model_state(model, whole), key=lambda entry: entry[0]):
        if isinstance(value, str):
            digest.update(f"{name} {value}\n".encode())
            continue
        dtype = _own_dtype(value)
        digest.update(f"{name} {list(value.shape)}{f' {dtype}' if dtype else ''}\n".encode())
        for piece in value.flatten().split(_PIECE):
            update_digest(digest, piece.to("cpu", dtype or torch.float32))
    return digest.hexdigest()


def sample(entries: Iterable[tuple[str, Tensor | str]]) -> str:
    """A digest of a few numbers of every tensor and their dtypes: tells models apart, in milliseconds."""
    digest = hashlib.sha256()
    for name, value in entries:
        if isinstance(value, str):
            digest.update(f"{name} {value}\n".encode())
            continue
        flat = value.detach().flatten()
        some = flat[:: max(1, len(flat) // 16)]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        update_digest(digest, some.to("cpu", _own_dtype(some) or torch.float32))
    return digest.hexdigest()


def update_digest(digest: Any, tensor: Tensor) -> None:
    """Feed a CPU tensor's bytes to a hash, without numpy and without a copy."""
    tensor = tensor.contiguous()
    if tensor.numel():
        digest.update((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))


def model_state(model: nn.Module, whole: Whole | None = None) -> Iterator[tuple[str, Tensor | str]]:
    """(name, plain tensor, or the text of a number, flag or word) of all that the output depends on.

    Parameters, tied ones once; all else that `state_dict()` holds, so persistent buffers, packed and extra state; what
    is in subclasses of tensors; tensors that a module without parameters and buffers has as attributes; what
    parametrizations make; active adapters and their strength. Not: buffers that are not persistent, which are computed
    from the configuration. Names are those inside `torch.compile`'s and other wrappers that change no output.
    """
    for name, value in _entries(model, whole):
        for wrapped in _WRAPPED:
            name = name.replace(wrapped, "")
        yield name, value


def _entries(model: nn.Module, whole: Whole | None) -> Iterator[tuple[str, Tensor | str]]:
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    # Modules that save what their parameters lack: bitsandbytes' move it about when they are first run.
    savers = {
        path for path, module in modules.items() if type(module)._save_to_state_dict != nn.Module._save_to_state_dict
    }
    listed = {id(parameter) for parameter in parameters.values()}
    state = {name: value for name, value in model.state_dict(keep_vars=True).items() if id(value) not in listed}
    for name, value in (parameters | _tied_once(model, state)).items():
        if isinstance(value, Tensor) and whole is not None:
            value = whole(name, value)
            if value is None:
                continue
        yield from _parts(name, value, saved=name.rpartition(".")[0] in savers)
    for path, module in modules.items():
        prefix = f"{path}." if path else ""
        if not module._parameters and not module._buffers and not module._modules:
            for name, value in vars(module).items():
                if isinstance(value, Tensor):
                    yield from _parts(prefix + name, value)
        for name, made in getattr(module, "parametrizations", {}).items():
            yield from _parts(f"{prefix}{name}", _evaluated(made))
        if hasattr(module, "merged_adapters"):
            for name in _ADAPTER:
                yield from _parts(f"{prefix}{name}", getattr(module, name, None))


def _tied_once(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """`state` without the second names of tied parameters."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: value for name, value in state.items() if name not in every}


def _evaluated(made: nn.Module) -> Tensor:
    """A parametrized weight, evaluated outside of training, where spectral norms change with every evaluation."""
    training = made.training
    made.train(False)
    try:
        weight: Tensor = made()
        return weight
    finally:
        made.train(training)


def _parts(name: str, value: Any, saved: bool = False) -> Iterator[tuple[str, Tensor | str]]:
    """The plain tensors and numbers that a value consists of.

    Args:
        saved: its module saves its attributes itself, so that they are left out here.
    """
    if isinstance(value, Tensor):
        yield from _tensors(name, value, saved)
    elif isinstance(value, Mapping):
        for key in value:
            yield from _parts(f"{name}.{key}", value[key])
    elif isinstance(value, (list, tuple, set, frozenset)):
        ordered = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        for index, item in enumerate(ordered):
            yield from _parts(f"{name}.{index}", item)
    elif isinstance(value, Enum):
        yield name, str(value)
    elif isinstance(value, (bytes, bytearray, BytesIO)):
        content = value.getvalue() if isinstance(value, BytesIO) else value
        yield name, hashlib.sha256(content).hexdigest()
    elif isinstance(value, (str, int, float, bool, complex, torch.dtype, torch.device, torch.layout, type(None))):
        yield name, repr(value)
    else:
        raise KvcalError(
            f"{name}: its weights are in a {type(value).__name__}, which cannot be read: calibrate and decode the "
            "model as it was before it was packed"
        )


def _tensors(name: str, tensor: Tensor, saved: bool) -> Iterator[tuple[str, Tensor | str]]:
    if hasattr(tensor, "full_tensor"):  # dealt to several processes
        tensor = tensor.full_tensor()
    if tensor.is_meta or is_lazy(tensor):
        raise KvcalError(f"{name}: its numbers are not here (meta device): load the model whole, with from_pretrained")
    if tensor.is_quantized:
        yield from _parts(f"{name}.q", _quantised(tensor))
    elif type(tensor) in _PLAIN:
        yield name, (tensor if tensor.layout == torch.strided else tensor.to_dense()).detach()
    elif hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        yield name, type(tensor).__qualname__
        yield from _parts(f"{name}.context", _readable(context))
        for inner in names:
            yield from _parts(f"{name}.{inner}", getattr(tensor, inner))
    else:
        yield name, tensor.detach().as_subclass(Tensor)
        attributes = {} if saved else _readable(_own(tensor))
        yield from _parts(f"{name}.of", {"class": type(tensor).__qualname__, **attributes})


def _quantised(tensor: Tensor) -> dict[str, Any]:
    """torch's own quantised tensors: integers and what they are multiplied with."""
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        scale: dict[str, Any] = {"scale": tensor.q_scale(), "zero_point": tensor.q_zero_point()}
    else:
        scale = {
            "scale": tensor.q_per_channel_scales(),
            "zero_point": tensor.q_per_channel_zero_points(),
            "axis": tensor.q_per_channel_axis(),
        }
    return {"integers": tensor.int_repr(), "dtype": tensor.dtype, **scale}


def _readable(value: Any, depth: int = 4) -> Any:
    """A library's own object as something that `_parts` takes: its public attributes; for functions and the like their
    type alone."""
    if isinstance(value, (Tensor, str, int, float, bool, bytes, Enum, torch.dtype, torch.device, type(None))):
        return value
    if isinstance(value, Mapping):
        return {str(key): _readable(item, depth - 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_readable(item, depth - 1) for item in value]
    if depth > 0 and not isinstance(value, nn.Module) and hasattr(value, "__dict__") and not callable(value):
        return _readable(_own(value), depth - 1)
    return f"a {type(value).__qualname__}"


def _own(value: Any) -> dict[str, Any]:
    return {name: item for name, item in vars(value).items() if not name.startswith("_")}


def _own_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype of a tensor with numbers that float32 does not hold; None where it holds them all."""
    if tensor.dtype == torch.float64:
        pieces = tensor.flatten().split(_PIECE)
        held = all(torch.equal(piece.float().double().nan_to_num(), piece.nan_to_num()) for piece in pieces)
        return None if held else torch.float64
    narrow = tensor.dtype.is_floating_point and not str(tensor.dtype).endswith("_x2")  # two numbers in a byte
    return None if narrow else tensor.dtype
