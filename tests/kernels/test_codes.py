"""Low-bit codes, against what is said of them written down."""

import math

import pytest
import torch

from kvcal.kernels.codes import BITS, STEP, decode, encode, fields_of, products, rotation


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(vector, bits):
    """(levels, scale) of one vector, dimension by dimension."""
    most = 2 ** (bits - 1) - 0.5
    step = max(abs(x) for x in vector) / most
    if bits in STEP:
        step = min(step, STEP[bits] * math.sqrt(sum(x * x for x in vector) / len(vector)))
    levels = [min(most, max(-most, math.floor(x / step) + 0.5)) for x in vector]
    return levels, sum(x * x for x in vector) / sum(x * level for x, level in zip(vector, levels, strict=True))


@pytest.mark.parametrize("bits", BITS)
def test_levels_and_scales_are_those_of_the_definition(bits):
    values = drawn(40, 16) * torch.logspace(-3, 3, 40).unsqueeze(1)
    codes, scales = encode(values, bits)
    assert codes.dtype == torch.uint8 and codes.shape == (40, 16 * bits // 8) and scales.dtype == torch.float16
    for vector, found, scale in zip(
        values.double().tolist(), decode(codes, torch.ones_like(scales), bits).tolist(), scales.tolist(), strict=True
    ):
        levels, wanted = by_hand(vector, bits)
        assert sum(a != b for a, b in zip(found, levels, strict=True)) <= 1, "float32 may round to the next level"
        assert scale == pytest.approx(wanted, rel=0.02 if bits == 2 else 2e-3)


@pytest.mark.parametrize("bits", BITS)
def test_estimates_along_a_vector_are_not_shrunk(bits):
    values = drawn(500, 64, seed=1)
    found = (values * decode(*encode(values, bits), bits)).sum(-1)
    torch.testing.assert_close(found, values.square().sum(-1), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("bits", "step"), [(2, 0.9957), (4, 0.3352)])
def test_the_step_is_the_best_for_a_normal_distribution(bits, step):
    """The mean square error of a uniform quantiser, integrated numerically, is least there (Max 1960)."""
    at = torch.linspace(-8, 8, 200_001, dtype=torch.float64)
    density = torch.exp(-at.square() / 2)

    def error(width):
        half = 2 ** (bits - 1)
        level = (torch.floor(at / width).clamp(-half, half - 1) + 0.5) * width
        return float(((at - level).square() * density).sum())

    tried = [step * factor for factor in (0.97, 0.99, 1.0, 1.01, 1.03)]
    assert min(tried, key=error) == step == pytest.approx(STEP[bits])


@pytest.mark.parametrize("bits", BITS)
def test_products_are_those_of_what_is_decoded(bits):
    values, query = drawn(3, 2, 50, 32, seed=2), drawn(3, 2, 4, 32, seed=3)
    codes, scales = encode(values, bits)
    wanted = query.double() @ decode(codes, scales, bits).double().mT
    torch.testing.assert_close(products(query, codes, scales, bits).double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", BITS)
def test_fields_lie_apart(bits):
    """Byte j holds dimensions j, j + n/f, …, lowest bits first."""
    values = torch.full((16,), -1.0)
    values[5] = 1.0
    whole, _ = encode(torch.full((16,), -1.0), bits)
    codes, _ = encode(values, bits)
    apart = 16 // fields_of(bits)
    changed = (codes != whole).nonzero().flatten().tolist()
    assert changed == [5 % apart]
    assert int(codes[5 % apart] ^ whole[5 % apart]) >> (5 // apart * bits) < 1 << bits


def test_nothing_is_a_scale_of_zero():
    codes, scales = encode(torch.zeros(2, 8), 2)
    assert scales.tolist() == [0, 0] and not decode(codes, scales, 2).any()


@pytest.mark.parametrize("dims", [16, 48, 64, 80, 128, 256])
def test_a_rotation_keeps_lengths_and_spreads_dimensions(dims):
    turn = rotation(dims)
    torch.testing.assert_close(turn @ turn.mT, torch.eye(dims, dtype=torch.float64), rtol=0, atol=1e-12)
    assert float(turn.abs().max()) <= math.sqrt(2 / dims) + 1e-12, "no dimension weighs more than twice its share"
    one_large = torch.ones(dims, dtype=torch.float64)
    one_large[3] = 30.0
    assert float((turn @ one_large).abs().max()) < 0.5 * 30


def test_few_bits_lose_less_of_rotated_vectors():
    """Of vectors whose dimensions differ as those of a basis do."""
    values = drawn(2000, 64, seed=4) * torch.logspace(0, -2, 64)
    turn = rotation(64).float()
    straight, turned = values, values @ turn.mT
    errors = [float((decode(*encode(of, 2), 2) - of).norm() / of.norm()) for of in (straight, turned)]
    assert errors[1] < 0.75 * errors[0]


@pytest.mark.parametrize(("bits", "dims"), [(2, 6), (4, 3), (3, 8)])
def test_what_cannot_be_packed(bits, dims):
    with pytest.raises(ValueError, match=r"values: received \d dimensions|bits: received 3"):
        encode(drawn(2, dims), bits)
