"""Symmetric codes: a scale of the largest magnitude, an error of half a step, nibbles of the two halves of a token."""

import pytest
import torch

from kvcal.kernels.score import quantize, unpack
from kvcal.kernels.score.quantize import bits_of, rank_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (4, 7)])
def test_codes_are_within_half_a_step(bits, largest, dtype):
    values = torch.randn(3, 5, 17, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    codes, scales = quantize(values, bits)
    assert scales.dtype == torch.float16 and scales.shape == values.shape[:-1]
    exact = values.double().abs().amax(-1) / largest
    torch.testing.assert_close(scales.double(), exact, rtol=2**-10, atol=0)
    integers = unpack(codes, bits).double()
    assert integers.abs().max() == largest and torch.equal(integers, integers.round())
    # Half a step, and what the rounding of the scale to float16 takes from the largest values.
    error = (values.double() - integers * scales.double().unsqueeze(-1)).abs()
    assert (error <= scales.double().unsqueeze(-1) * (0.5 + largest * 2**-11) * (1 + 1e-6)).all()


def test_four_bits_keep_the_two_halves_of_a_token_in_the_nibbles():
    codes, scales = quantize(torch.tensor([[-7.0, 0.0, 3.0, 7.0, 1.0, -2.0]]), 4)
    assert scales.tolist() == [1.0]
    assert codes.tolist() == [[(-7 + 8) + 16 * (7 + 8), (0 + 8) + 16 * (1 + 8), (3 + 8) + 16 * (-2 + 8)]]
    assert unpack(codes, 4).tolist() == [[-7, 0, 3, 7, 1, -2]]
    assert (codes.dtype, bits_of(codes), rank_of(codes)) == (torch.uint8, 4, 6)


def test_sixteen_bits_are_the_values():
    values = torch.randn(2, 3, dtype=torch.bfloat16)
    codes, scales = quantize(values, 16)
    assert codes is values and scales is None and bits_of(codes) == 16 and rank_of(codes) == 3


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [0.0, 1e-12, 1e30])
def test_scales_stay_finite_and_zero_stays_zero(bits, value):
    codes, scales = quantize(torch.tensor([[value, -value]]), bits)
    integers = unpack(codes, bits)
    assert scales.isfinite().all() and torch.equal(integers[:, 0], -integers[:, 1])
    if value < 1:
        assert scales.item() == 0 and not integers.any()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="bits: received 3, expected 16, 8 or 4"):
        quantize(torch.zeros(2), 3)
    with pytest.raises(ValueError, match="values: received 5 dimensions, expected an even number for 4 bits"):
        quantize(torch.zeros(2, 5), 4)
