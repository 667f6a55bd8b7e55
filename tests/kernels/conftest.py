import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    """Where the operands of a kernel's test live: without a GPU, in Triton's interpreter (see `tests/conftest.py`)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
