"""The one table of tolerances: what a result that was rounded once to a dtype may differ from float64's.

Sums are taken in float32 whatever the dtype of the operands, so float32's entry covers the order of a sum, and
the others are a few units of the last place of the dtype.
"""

import torch
from torch import Tensor

RELATIVE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
ABSOLUTE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """`expected` is a float64 oracle; `dtype` the coarsest dtype that the result went through (default: actual's).

    A NaN is never close to anything: outputs are filled with NaN before a kernel runs.
    """
    dtype = dtype or actual.dtype
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    torch.testing.assert_close(
        actual.double().cpu(), expected.double().cpu(), rtol=RELATIVE[dtype], atol=ABSOLUTE[dtype]
    )
