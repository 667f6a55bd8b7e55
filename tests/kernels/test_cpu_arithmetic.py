"""Functions of single numbers in numba, against numpy's."""

import numpy as np
import torch

from kvcal.kernels.cpu.arithmetic import exp2, half_of, of_brain, of_half, share

ALL_BITS = np.arange(1 << 16, dtype=np.int32)


def test_exp2_is_within_2e_7_and_clamps():
    numbers = np.linspace(-126, 127, 100_001).astype(np.float32)
    found = np.array([exp2(number) for number in numbers], np.float64)
    assert np.abs(found / np.exp2(numbers.astype(np.float64)) - 1).max() < 2e-7
    assert exp2(np.float32(-np.inf)) == exp2(np.float32(-500)) == 2.0**-126 and exp2(np.float32(500)) == 2.0**127
    assert share(np.float32(-np.inf), np.float32(0)) == 0 and share(np.float32(2), np.float32(2)) == 1


def test_floats_of_16_bits_are_those_of_torch():
    for dtype, of_bits in ((torch.float16, of_half), (torch.bfloat16, of_brain)):
        expected = torch.from_numpy(ALL_BITS.astype(np.uint16).view(np.int16)).view(dtype).float().numpy()
        finite = np.isfinite(expected)
        found = np.array([of_bits(bits) for bits in ALL_BITS[finite]], np.float32)
        assert (found == expected[finite]).all()


def test_half_of_rounds_as_torch_does():
    """Every float16 that is not negative, what lies half-way to the next one, and what is next to that."""
    halves = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).double()
    between = (halves[:-1] + halves[1:]) / 2
    numbers = torch.cat((halves, between, between * (1 + 2**-20), between * (1 - 2**-20))).float()
    found = np.array([half_of(number) for number in numbers.numpy()], np.int16)
    assert (found == numbers.half().view(torch.int16).numpy()).all()
    assert half_of(np.float32(np.nan)) == half_of(np.float32(np.inf)) == 0x7E00  # not a number
