import pytest
import torch
from select_problem import SMALL


@pytest.fixture
def device() -> torch.device:
    """Where the operands of a kernel's test live: without a GPU, in Triton's interpreter (see `tests/conftest.py`)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def set_splits(monkeypatch):
    """A function that fixes how many parts `attend` and `dense` cut a unit's tokens into; None leaves it to them."""
    from kvcal.kernels.attend import triton_kernel as attend
    from kvcal.kernels.dense import triton_kernel as dense

    def fix(splits: int | None) -> None:
        for module in (attend, dense) if splits else ():
            monkeypatch.setattr(module, "choose_splits", lambda *_: splits)

    return fix


@pytest.fixture
def small_tiles(monkeypatch) -> None:
    """Makes `select` deal short rows of scores to several programs."""
    from kvcal.kernels.select import triton_kernel as kernel

    for name, size in SMALL.items():
        monkeypatch.setattr(kernel, name, size)
