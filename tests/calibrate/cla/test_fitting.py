"""Fitted projections: exact where layers differ by what queries and outputs absorb, else the best in their metric."""

import numpy as np
import pytest
import torch

from kvcal.calibrate.cla.fitting import LayerMoments, LayerWeights, fit_group, shared_rows

HEADS, GROUP, DIM, INPUTS = 2, 3, 8, 24
ROTARY = [DIM, 4, 0]
"""All of a head's dimensions rotate, the first four, none."""


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def positive(size, seed):
    root = random(size, size, seed=seed)
    return root @ root.mT / size + torch.eye(size, dtype=torch.float64)


def layer(seed=0):
    return LayerWeights(
        random(HEADS, DIM, INPUTS, seed=seed),
        random(HEADS, DIM, INPUTS, seed=seed + 1),
        random(HEADS, GROUP, INPUTS, DIM, seed=seed + 2),
    )


def queries(seed=0):
    return torch.stack([positive(DIM, seed + head) for head in range(HEADS)])


def rotated(vectors, angles, rotary_dims):
    """[…, D] as complex numbers i + rotary_dims / 2 · j, each turned by its angle."""
    half = rotary_dims // 2
    turned = torch.complex(vectors[..., :half], vectors[..., half:rotary_dims]) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.cat((turned.real, turned.imag, vectors[..., rotary_dims:]), -1)


def absorbed(keys, rotary_dims, seed):
    """The same keys [H, D, E] with a complex factor in each plane, and a map of the other dimensions."""
    half = rotary_dims // 2
    factor = torch.complex(random(HEADS, half, 1, seed=seed), random(HEADS, half, 1, seed=seed + 1))
    planes = torch.complex(keys[:, :half], keys[:, half:rotary_dims]) * factor
    rest = DIM - rotary_dims
    return torch.cat((planes.real, planes.imag, random(HEADS, rest, rest, seed=seed + 2) @ keys[:, rotary_dims:]), 1)


@pytest.mark.parametrize("rotary_dims", ROTARY)
def test_what_queries_and_outputs_absorb_costs_nothing(rotary_dims):
    storing, inputs = layer(), positive(INPUTS, 5)
    mix = random(INPUTS, INPUTS, seed=6) / 5  # the reading layers' inputs follow from the storing one's
    back = torch.linalg.inv(mix)
    reading = [
        LayerWeights(
            absorbed(storing.key, rotary_dims, seed) @ back,
            random(HEADS, DIM, DIM, seed=seed + 3) @ storing.value @ back,
            layer(seed).output,
        )
        for seed in (10, 20)
    ]
    moments = [LayerMoments(inputs, queries(1)), *(LayerMoments(mix @ inputs, queries(seed)) for seed in (2, 3))]
    fitted = fit_group([storing, *reading], moments, rotary_dims)
    for number, own in enumerate([storing, *reading]):
        to_own = torch.eye(INPUTS, dtype=torch.float64) if number == 0 else mix
        keys = fitted.query_maps[number].mT @ fitted.key
        # The ridge on the inputs' moments is all that is between them.
        torch.testing.assert_close(keys, own.key @ to_own, rtol=0, atol=2e-3 * float(own.key.abs().max()))
        values = fitted.value_maps[number] @ fitted.value
        torch.testing.assert_close(values, own.value @ to_own, rtol=0, atol=2e-3 * float(own.value.abs().max()))


@pytest.mark.parametrize("rotary_dims", ROTARY)
def test_queries_are_mapped_by_what_commutes_with_the_rotation(rotary_dims):
    weights, moments = [layer(0), layer(10)], [LayerMoments(positive(INPUTS, seed), queries(seed)) for seed in (1, 2)]
    fitted = fit_group(weights, moments, rotary_dims)
    angles, vectors = random(rotary_dims // 2, seed=7), random(HEADS, 5, DIM, seed=8)
    for maps in fitted.query_maps:
        first = rotated(vectors @ maps.mT, angles, rotary_dims)
        torch.testing.assert_close(first, rotated(vectors, angles, rotary_dims) @ maps.mT)


def test_shared_values_leave_the_least_that_any_of_their_rank_can():
    """Eckart and Young, by numpy's singular values of the stacked targets in their metrics."""
    targets, metrics = [random(DIM, INPUTS, seed=seed) for seed in (1, 2)], [positive(DIM, seed) for seed in (3, 4)]
    second = positive(INPUTS, 9)
    rows, maps = shared_rows(targets, metrics, second)
    left = 0.0
    for target, metric, made in zip(targets, metrics, maps, strict=True):
        error = target - made @ rows
        left += float((metric @ error @ second @ error.mT).trace())
    stacked = [
        np.linalg.cholesky(metric.numpy()).T @ target.numpy() for metric, target in zip(metrics, targets, strict=True)
    ]
    singular = np.linalg.svd(np.concatenate(stacked) @ np.linalg.cholesky(second.numpy()), compute_uv=False)
    assert left == pytest.approx(float((singular[DIM:] ** 2).sum()), rel=1e-6)


def test_shared_keys_leave_the_least_that_one_complex_number_per_plane_can():
    weights, second = [layer(0), layer(10)], positive(INPUTS, 9)
    moments = [LayerMoments(second, queries(1)), LayerMoments(second, queries(2))]
    fitted = fit_group(weights, moments, DIM)
    half = DIM // 2
    for head in range(HEADS):
        for plane in range(half):
            rows, left = [], 0.0
            for number, (own, moment) in enumerate(zip(weights, moments, strict=True)):
                energy = float(moment.query[head].diagonal()[[plane, plane + half]].sum())
                # With the same inputs the prediction is W · second · (second + ridge)⁻¹.
                ridge = 1e-4 * second.diagonal().mean() * torch.eye(INPUTS, dtype=torch.float64)
                key = own.key[head] if number == 0 else own.key[head] @ second @ torch.linalg.inv(second + ridge)
                found = (fitted.query_maps[number][head].mT @ fitted.key[head])[[plane, plane + half]]
                error = key[[plane, plane + half]] - found
                left += energy * float((error @ (second + ridge) @ error.mT).trace())
                rows.append(energy**0.5 * torch.complex(key[plane], key[plane + half]).numpy())
            root = np.linalg.cholesky((second + ridge).numpy())
            singular = np.linalg.svd(np.stack(rows) @ root, compute_uv=False)
            assert left == pytest.approx(float((singular[1:] ** 2).sum()), rel=1e-6)


def test_layers_that_are_alike_keep_their_keys():
    own, second = layer(), positive(INPUTS, 5)
    moments = [LayerMoments(second, queries(1)), LayerMoments(second, 50 * queries(3))]
    fitted = fit_group([own, own], moments, DIM)
    torch.testing.assert_close(fitted.key, own.key, rtol=0, atol=2e-3 * float(own.key.abs().max()))


def test_dimensions_that_no_query_and_no_output_uses_are_no_numbers_to_divide_by():
    own = layer()
    silent = LayerWeights(own.key, own.value, torch.zeros_like(own.output))
    moments = [LayerMoments(positive(INPUTS, 5), torch.zeros_like(queries()))] * 2
    fitted = fit_group([silent, silent], moments, 4)
    zero = LayerWeights(torch.zeros_like(own.key), torch.zeros_like(own.value), own.output)
    of_zero = fit_group([zero, own], [LayerMoments(positive(INPUTS, 5), queries())] * 2, 4)
    for tensor in (of_zero.key, of_zero.value, *of_zero.query_maps, *of_zero.value_maps):
        assert torch.isfinite(tensor).all()
    for tensor in (fitted.key, fitted.value, *fitted.query_maps, *fitted.value_maps):
        assert torch.isfinite(tensor).all()
