"""What groups cost, against numpy's singular values and attention written out, and where a fit can be exact."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from architectures import rotate
from related_layers import DIM, HEADS, artifact, layer, reading_copy

from kvcal.calibrate.cla.group_cost import measure_groups

TOKENS = 90
SCALING = 0.4  # of the artifact's layers
POSITION = torch.arange(TOKENS) % 40


def weights(tensors):
    """[Hkv, q, N] by numpy, every token's own; a query sees the positions up to its own."""
    scores = SCALING * (tensors["query_post"].double() @ tensors["key_post"].double().mT).numpy()
    scores[:, np.asarray(POSITION)[None, :] > np.asarray(POSITION)[:, None]] = -np.inf
    found = np.exp(scores - scores.max(-1, keepdims=True))
    return found / found.sum(-1, keepdims=True)


def best_of_rank(parts, received, rank, roots):
    """Each of `parts` [N, D] from the `rank` leading directions of all of them, weighted and in their metrics."""
    scale = np.sqrt(received)[:, None]
    rows = np.concatenate([part @ root.T for part, root in zip(parts, roots, strict=True)], 1)
    right = np.linalg.svd(scale * rows, full_matrices=False)[2][:rank]
    kept = rows @ right.T @ right
    return [each @ np.linalg.inv(root).T for each, root in zip(np.split(kept, len(parts), 1), roots, strict=True)]


def test_against_numpy_without_a_rotation():
    layers = [layer(seed) for seed in range(3)]
    attention = [weights(each) for each in layers]
    received = sum(each.sum((0, 1)) for each in attention[:2])
    outputs = [own @ each["value"].double().numpy() for own, each in zip(attention, layers, strict=True)]
    of_values = [np.eye(4) / np.linalg.norm(output) for output in outputs[:2]]
    errors = []
    keys, values = ([np.empty(each[name].shape) for each in layers[:2]] for name in ("key_post", "value"))
    for head in range(HEADS):
        own = [[each[name][head].double().numpy() for each in layers[:2]] for name in ("key_post", "value")]
        queries = [each["query_post"][head].double().numpy() for each in layers[:2]]
        roots = [np.linalg.cholesky(query.T @ query).T for query in queries]
        for place, parts, metric in ((keys, own[0], roots), (values, own[1], of_values)):
            for number, made in enumerate(best_of_rank(parts, received, parts[0].shape[1], metric)):
                place[number][head] = made
    for number, each in enumerate(layers[:2]):
        expected = outputs[number]
        found = weights({**each, "key_post": torch.from_numpy(keys[number])}) @ values[number]
        errors.append(np.square(found - expected).sum() / np.square(expected).sum())
    costs = measure_groups(artifact(layers), [(0, 1), (0, 1, 2)])
    assert float(costs[1, 0]) == pytest.approx(sum(errors), rel=1e-4)
    assert float(costs[2, 0]) > float(costs[1, 0]) > 0
    assert int((~costs.isnan()).sum()) == 2


def test_how_large_the_values_of_a_layer_are_does_not_matter():
    first, second = layer(0), layer(1)
    large = {**second, "value": 10 * second["value"]}
    costs = [float(measure_groups(artifact([first, other]), [(0, 1)])[1, 0]) for other in (second, large)]
    assert costs[0] == pytest.approx(costs[1], rel=1e-4)


def turned(keys, angles, interleaved=False):
    angles = POSITION[:, None] * angles
    cos, sin = (part.repeat(1, 2)[None] for part in (angles.cos(), angles.sin()))
    return rotate(keys[None], cos, sin, interleaved)[0], (cos[0], sin[0])


def test_keys_that_differ_by_a_factor_in_each_plane_cost_nothing_and_others_do():
    """The keys of a rotary embedding over four of six dimensions, and over all of them."""
    for dims in (4, DIM):
        angles = torch.rand(dims // 2, generator=torch.Generator().manual_seed(1))
        first = layer(0)
        factor = torch.polar(torch.tensor([0.5, 2.0, 3.0])[: dims // 2], torch.tensor([1.0, 2.0, 4.0])[: dims // 2])
        pre = first["key_post"].clone()
        planes = torch.complex(pre[..., : dims // 2], pre[..., dims // 2 : dims]) * factor
        rest = pre[..., dims:] @ torch.randn(DIM - dims, DIM - dims, generator=torch.Generator().manual_seed(2))
        alike = torch.cat((planes.real, planes.imag, rest), -1)
        mixed = pre @ torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(3))
        layers = [
            {**reading_copy(first, seed), "key_post": turned(keys, angles)[0]}
            for seed, keys in ((4, pre), (5, alike), (6, mixed))
        ]
        found = artifact(layers)
        found = replace(found, layers=tuple(replace(each, pre_rotary="unrotate") for each in found.layers))
        costs = measure_groups(found, [(0, 1), (1, 2)], turned(pre, angles)[1])
        assert float(costs[1, 0]) == pytest.approx(0, abs=1e-6) and float(costs[2, 1]) > 0.01


def test_progress_counts_groups():
    seen = []
    groups = [(0, 1), (1, 2), (0, 1, 2)]
    measure_groups(artifact([layer(seed) for seed in range(3)]), groups, progress=lambda *given: seen.append(given))
    assert seen == [(1, 3), (2, 3), (3, 3)]
