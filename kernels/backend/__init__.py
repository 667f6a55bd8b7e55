"""Which implementation of an operation runs. Imports no triton: a kernel is imported when it is first chosen."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

_refused = False
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("auto", "triton", "numba", "reference")


def choose(backend: str, tensor: Tensor, *, triton: bool = True, numba: bool = False) -> str:
    """`"triton"`, `"numba"` or `"reference"` for a call whose operands live where `tensor` does.

    `"auto"` takes Triton for CUDA tensors and numba on a CPU, where they are installed, and the reference otherwise.
    Others are taken at their word: ValueError where one cannot run, never another in silence.

    Args:
        triton, numba: whether the operation has a kernel of it.
    """
    if backend == "reference":
        return "reference"
    if backend == "auto":
        if triton and tensor.is_cuda and has_triton():
            return "triton"
        return "numba" if numba and not tensor.is_cuda and takes_numba(tensor) else "reference"
    if backend == "numba" and numba:
        if not has_numba():
            raise ValueError("backend: received 'numba', which is not installed: pip install numba, or use 'auto'")
        if not takes_numba(tensor):
            raise ValueError(
                f"backend: received 'numba' for {tensor.dtype} on {tensor.device}, expected numbers of at most 32 bits "
                "on a CPU without gradients"
            )
        return "numba"
    known = [name for name, has in zip(BACKENDS, (True, triton, numba, True), strict=True) if has]
    if backend not in known:
        raise ValueError(f"backend: received {backend!r}, expected one of {', '.join(known)}")
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


@cache
def has_numba() -> bool:
    return find_spec("numba") is not None


def refuse_numba() -> None:
    """Let this process run no kernel in numba."""
    global _refused
    _refused = True


def takes_numba(tensor: Tensor) -> bool:
    """Whether numba is installed and can work on this tensor, whose gradients it would lose."""
    needs_gradient = tensor.requires_grad and torch.is_grad_enabled()
    return has_numba() and not _refused and tensor.is_cpu and tensor.dtype in FLOATS and not needs_gradient


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, where arithmetic on bfloat16 is silently wrong."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "on", "yes", "y"}


def device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Makes the tensor's GPU the current one: Triton launches on the current GPU, whatever its operands live on."""
    return torch.cuda.device_of(tensor)
