"""Which implementation of an operation runs. Imports no triton: a kernel is imported when it is first chosen."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "reference")


def choose(backend: str, tensor: Tensor) -> str:
    """`"triton"` or `"reference"` for a call whose operands live where `tensor` does.

    `"auto"` takes Triton for CUDA tensors (where triton is installed) and the reference otherwise. `"triton"` and
    `"reference"` are taken at their word: ValueError where Triton cannot run, never the other one in silence.
    """
    if backend == "reference":
        return "reference"
    if backend == "auto":
        return "triton" if tensor.is_cuda and has_triton() else "reference"
    if backend != "triton":
        raise ValueError(f"backend: received {backend!r}, expected one of {', '.join(BACKENDS)}")
    if not has_triton():
        raise ValueError("backend: received 'triton', which is not installed: pip install triton, or use 'auto'")
    if not (tensor.is_cuda or interpreting()):
        raise ValueError(
            f"backend: received 'triton' for tensors on {tensor.device}, expected CUDA tensors "
            "(or TRITON_INTERPRET=1 in the environment before triton is imported)"
        )
    return "triton"


def check_operand(name: str, operand: Tensor, dtype: torch.dtype, shape: Sequence[int], like: Tensor) -> None:
    """ValueError unless `operand` is contiguous, has this dtype and shape and lies where `like` does."""
    fits = operand.dtype == dtype and operand.shape == tuple(shape) and operand.device == like.device
    if not (fits and operand.is_contiguous()):
        raise ValueError(
            f"{name}: received {operand.dtype} {list(operand.shape)} on {operand.device}, "
            f"expected contiguous {dtype} {list(shape)} on {like.device}"
        )


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, where arithmetic on bfloat16 is silently wrong."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "on", "yes", "y"}


def device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Makes the tensor's GPU the current one: Triton launches on the current GPU, whatever its operands live on."""
    return torch.cuda.device_of(tensor)
