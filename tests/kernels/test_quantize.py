"""Symmetric codes: a scale of the largest magnitude, an error of half a step, nibbles of the two halves of a token."""

import pytest
import torch

from kvcal.kernels.score import quantize, unpack
from kvcal.kernels.score.quantize import rank_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (4, 7), (2, 1.5)])
def test_codes_are_within_half_a_step(bits, largest, dtype):
    values = torch.randn(3, 5, 17, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    codes, scales = quantize(values, bits)
    assert scales.dtype == torch.float16 and scales.shape == values.shape[:-1]
    exact = values.double().abs().amax(-1) / largest
    torch.testing.assert_close(scales.double(), exact, rtol=2**-10, atol=0)
    integers = unpack(codes, bits).double()
    assert integers.abs().max() == largest and torch.equal(integers - largest, (integers - largest).round())
    # Half a step, and what the rounding of the scale to float16 takes from the largest values.
    error = (values.double() - integers * scales.double().unsqueeze(-1)).abs()
    assert (error <= scales.double().unsqueeze(-1) * (0.5 + largest * 2**-11) * (1 + 1e-6)).all()


def test_four_bits_keep_the_two_halves_of_a_token_in_the_nibbles():
    codes, scales = quantize(torch.tensor([[-7.0, 0.0, 3.0, 7.0, 1.0, -2.0]]), 4)
    assert scales.tolist() == [1.0]
    assert codes.tolist() == [[(-7 + 8) + 16 * (7 + 8), (0 + 8) + 16 * (1 + 8), (3 + 8) + 16 * (-2 + 8)]]
    assert unpack(codes, 4).tolist() == [[-7, 0, 3, 7, 1, -2]]
    assert (codes.dtype, rank_of(codes, 4)) == (torch.uint8, 6)


def test_two_bits_keep_the_four_quarters_of_a_token_in_the_fields():
    codes, scales = quantize(torch.tensor([[-1.5, 0.2, -0.2, 1.1, 0.9, 1.5, -0.9, -1.1]]), 2)
    assert scales.tolist() == [1.0]
    assert codes.tolist() == [[0 + 4 * 1 + 16 * 2 + 64 * 1, 2 + 4 * 3 + 16 * 3 + 64 * 0]]
    assert unpack(codes, 2).tolist() == [[-1.5, 0.5, -0.5, 1.5, 0.5, 1.5, -0.5, -1.5]]
    assert (codes.dtype, rank_of(codes, 2)) == (torch.uint8, 8)


@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (4, 7), (2, 1.5)])
@pytest.mark.parametrize("clip", [0.25, 0.6])
def test_what_lies_beyond_the_clip_gets_the_largest_level(bits, largest, clip):
    values = torch.randn(400, 32, generator=torch.Generator().manual_seed(2))
    codes, scales = quantize(values, bits, clip)
    bound = clip * values.double().abs().amax(-1)
    torch.testing.assert_close(scales.double(), bound / largest, rtol=2**-10, atol=0)
    levels, bound = unpack(codes, bits).double(), bound.unsqueeze(-1)
    beyond = values.abs() > bound * 1.001
    assert beyond.any() and torch.equal(levels[beyond], largest * values[beyond].double().sign())
    error = (values.double() - levels * scales.double().unsqueeze(-1)).abs()
    half = scales.double().unsqueeze(-1) * (0.5 + largest * 2**-11) * (1 + 1e-6)
    assert (error <= half)[values.abs() <= bound].all()


def test_two_bits_of_normal_numbers_gain_by_a_clip():
    """Of 64 normal numbers the largest is about 2.4 deviations; the best four even levels reach 1.5 · 0.996 of one."""
    values = torch.randn(4000, 64, generator=torch.Generator().manual_seed(3))

    def error(clip):
        codes, scales = quantize(values, 2, clip)
        return (values - unpack(codes, 2) * scales.float().unsqueeze(-1)).square().mean().item()

    assert error(0.6) == pytest.approx(0.1188, rel=0.1) and error(0.6) < 0.7 * error(1.0)


def test_sixteen_bits_are_the_values():
    values = torch.randn(2, 3, dtype=torch.bfloat16)
    codes, scales = quantize(values, 16)
    assert codes is values and scales is None and rank_of(codes, 16) == 3


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("value", [0.0, 1e-12, 1e30])
def test_scales_stay_finite_and_zero_stays_zero(bits, value):
    codes, scales = quantize(torch.tensor([[value, value, -value, -value]]), bits)
    integers = unpack(codes, bits)
    assert scales.isfinite().all()
    if value < 1:
        assert scales.item() == 0 and (bits == 2 or not integers.any())
    else:
        assert torch.equal(integers[:, :2], -integers[:, 2:])


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="bits: received 3, expected 16, 8, 4 or 2"):
        quantize(torch.zeros(2), 3)
    with pytest.raises(ValueError, match="values: received 5 dimensions, expected an even number for 4 bits"):
        quantize(torch.zeros(2, 5), 4)
    with pytest.raises(ValueError, match="values: received 6 dimensions, expected a multiple of 4 for 2 bits"):
        quantize(torch.zeros(2, 6), 2)
    with pytest.raises(ValueError, match="clip: received 0, expected a positive number"):
        quantize(torch.zeros(2, 4), 2, clip=0)
