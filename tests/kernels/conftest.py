import pytest
import torch
from select_problem import SMALL


@pytest.fixture
def device() -> torch.device:
    """Where the operands of a kernel's test live: without a GPU, in Triton's interpreter (see `tests/conftest.py`)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def small_tiles(monkeypatch) -> None:
    """Makes `select` deal short rows to several programs."""
    from kvcal.kernels.select import triton_kernel as kernel

    for name, size in SMALL.items():
        monkeypatch.setattr(kernel, name, size)
