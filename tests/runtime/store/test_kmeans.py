"""Cosine k-means of many sets at once, against loops over each set, scikit-learn and faiss."""

from __future__ import annotations

from collections.abc import Sequence

import faiss
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans as Reference
from torch import Tensor

from kvcal.artifacts import KvcalError
from kvcal.kernels.cluster import reference
from kvcal.runtime.methods import kmeans
from kvcal.runtime.methods.kmeans import spherical_kmeans

LENGTHS, COUNTS = (200, 3, 77, 1), (12, 3, 5, 1)


def directions(*shape: int, seed: int = 0) -> Tensor:
    """Of many lengths, which must not matter, and with a common part, as keys have."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(shape, generator=generator) + 0.5
    return points * (0.1 + 3 * torch.rand(*shape[:-1], 1, generator=generator))


def blobs(
    sets: int, centres: int, each: int, dims: int = 16, noise: float = 0.05, seed: int = 0, shuffled: bool = True
) -> Tensor:
    """[sets, 1, centres · each, dims]: tight bundles of directions."""
    generator = torch.Generator().manual_seed(seed)
    middle = F.normalize(torch.randn(sets, centres, 1, dims, generator=generator), dim=-1)
    points = middle + noise * torch.randn(sets, centres, each, dims, generator=generator)
    order = torch.randperm(centres * each, generator=generator) if shuffled else torch.arange(centres * each)
    return points.flatten(1, 2)[:, order].unsqueeze(1)


def lloyd(row: Tensor, start: Tensor, iterations: int, tolerance: float) -> tuple[Tensor, Tensor, int]:
    """([H, n] labels, [H, C, D] centroids, passes) of the H sets [H, n, D] of a row, one token after another."""
    unit = row.double() / row.double().norm(dim=-1, keepdim=True)
    heads, tokens, _ = unit.shape
    centroids, labels, passes = start.double().clone(), torch.full((heads, tokens), -1), 0
    for _ in range(iterations):
        passes, moved = passes + 1, 0
        for head in range(heads):
            similarity = unit[head] @ centroids[head].T
            found = similarity.argmax(-1)
            moved += int((found != labels[head]).sum())
            labels[head] = found
            left = similarity.amax(-1).argsort(stable=True).tolist()
            for cluster in range(start.shape[1]):
                members = unit[head, found == cluster]
                if len(members):
                    centroids[head, cluster] = F.normalize(members.sum(0), dim=0)
                else:
                    centroids[head, cluster] = unit[head, left.pop(0)]
        if moved <= tolerance * heads * tokens:
            break
    for head in range(heads):
        labels[head] = (unit[head] @ centroids[head].T).argmax(-1)
    return labels, centroids, passes


def objective(points: Tensor, centroids: Tensor) -> float:
    """Mean cosine of a point and its centroid."""
    return float((F.normalize(points, dim=-1) @ F.normalize(centroids, dim=-1).mT).amax(-1).mean())


def by_attraction(row: Tensor, start: Tensor) -> Tensor:
    """[H, C, D] with the centroids first that attract most of [H, n, D]."""
    near = (F.normalize(row, dim=-1) @ start.mT).argmax(-1)
    sizes = torch.stack([torch.bincount(of, minlength=start.shape[1]) for of in near])
    return torch.stack([start[head, order] for head, order in enumerate(sizes.argsort(descending=True, stable=True))])


@pytest.mark.parametrize("tolerance", [0.0, 0.02, 0.2], ids=str)
@pytest.mark.parametrize("iterations", [1, 4, 20])
def test_equals_loops_over_each_set(iterations: int, tolerance: float) -> None:
    points = directions(len(LENGTHS), 2, max(LENGTHS), 8)
    start = F.normalize(directions(2, max(COUNTS), 8, seed=1), dim=-1)
    found = spherical_kmeans(points, LENGTHS, COUNTS, start=start, iterations=iterations, tolerance=tolerance)
    for row, (length, count) in enumerate(zip(LENGTHS, COUNTS, strict=True)):
        mine = points[row, :, :length]
        begun = by_attraction(mine, start)[:, :count]
        labels, centroids, passes = lloyd(mine, begun, iterations, tolerance)
        assert found.iterations[row] == passes
        assert torch.equal(found.labels[row, :, :length], labels)
        torch.testing.assert_close(found.centroids[row, :, :count].double(), centroids, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("known", [0, 4, 30], ids=["none-known", "some-known", "more-known-than-needed"])
def test_rows_of_a_batch_equal_each_alone(known: int) -> None:
    points = directions(len(LENGTHS), 3, max(LENGTHS), 16)
    start = directions(3, known, 16, seed=2) if known else None
    together = spherical_kmeans(points, LENGTHS, COUNTS, start=start)
    for row, (length, count) in enumerate(zip(LENGTHS, COUNTS, strict=True)):
        alone = spherical_kmeans(points[row : row + 1, :, :length], [length], [count], start=start)
        assert alone.iterations == [together.iterations[row]]
        assert torch.equal(alone.labels[0], together.labels[row, :, :length])
        torch.testing.assert_close(alone.centroids[0], together.centroids[row, :, :count])


def test_what_lies_beyond_a_row_does_not_matter() -> None:
    points, other = directions(4, 2, 200, 8), directions(4, 2, 200, 8)
    for row, length in enumerate(LENGTHS):
        other[row, :, length:] = 1e6
    one, two = (spherical_kmeans(each, LENGTHS, COUNTS) for each in (points, other))
    assert torch.equal(one.centroids, two.centroids) and one.iterations == two.iterations
    for row, length in enumerate(LENGTHS):
        assert torch.equal(one.labels[row, :, :length], two.labels[row, :, :length])


def test_blocks_of_similarities_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    points = directions(2, 2, 120, 8)
    whole = spherical_kmeans(points, [120, 90], [9, 6])
    monkeypatch.setattr(reference, "BLOCK", 2 * 2 * 9 * 7)
    parts = spherical_kmeans(points, [120, 90], [9, 6])
    assert torch.equal(whole.labels, parts.labels) and whole.iterations == parts.iterations


@pytest.mark.parametrize("points", [directions(1, 1, 600, 12), blobs(1, 20, 30, noise=0.15)], ids=["spread", "blobs"])
def test_as_good_as_others(points: Tensor) -> None:
    """1 - cosine to the centroid, mean over 24 orders: at most 1 %, or two standard errors, above that of k-means which
    begins with random tokens, as this does in any order."""
    count, dims = 20, points.shape[-1]
    unit = F.normalize(points[0, 0], dim=-1).numpy()
    ours, others = [], ([], [])
    for seed in range(24):
        order = torch.randperm(600, generator=torch.Generator().manual_seed(seed))
        ours.append(spherical_kmeans(points[:, :, order], [600], [count]).centroids)
        by_lloyd = Reference(count, init="random", n_init=1, random_state=seed).fit(unit).cluster_centers_
        by_faiss = faiss.Kmeans(dims, count, niter=20, spherical=True, seed=seed + 1, min_points_per_centroid=1)
        by_faiss.train(unit)
        for runs, centroids in zip(others, (by_lloyd, by_faiss.centroids), strict=True):
            runs.append(torch.from_numpy(centroids)[None, None])
    mine, *theirs = (torch.tensor([1 - objective(points, each) for each in runs]) for runs in (ours, *others))
    for other in theirs:
        error = ((mine.var() + other.var()) / len(mine)).sqrt()
        assert mine.mean() <= other.mean() + max(0.01 * other.mean(), 2 * error)


def test_finds_clusters_that_are_there() -> None:
    """Where a token of each is begun with: bundles one after the other."""
    points = blobs(3, 8, 25, noise=0.02, shuffled=False)
    found = spherical_kmeans(points, [200] * 3, [8] * 3)
    for row in range(3):
        assert torch.bincount(found.labels[row, 0], minlength=8).tolist() == [25] * 8
    assert max(found.iterations) < 20


def test_stops_early_row_by_row() -> None:
    easy, hard = blobs(1, 5, 40), directions(1, 1, 200, 16)
    found = spherical_kmeans(torch.cat((easy, hard)), [200, 200], [5, 5], tolerance=0.0)
    assert found.iterations[0] < found.iterations[1] <= 20
    assert spherical_kmeans(hard, [200], [5], tolerance=1.0).iterations == [1]
    assert spherical_kmeans(hard, [200], [5], tolerance=0.0, iterations=3).iterations == [3]


def test_calibrated_centroids_save_passes() -> None:
    """Two samples of the same spread-out directions: the first one's centroids begin the second's."""
    middle = directions(1, 2, 40, 16, seed=5)
    samples = [
        (middle.repeat(1, 1, 25, 1) + 0.6 * torch.randn(1, 2, 1000, 16, generator=torch.Generator().manual_seed(seed)))
        for seed in range(6)
    ]
    known = spherical_kmeans(samples[0], [1000], [25], tolerance=0.0, iterations=100).centroids[0]
    cold, warm = 0, 0
    for sample in samples[1:]:
        plain, begun = (spherical_kmeans(sample, [1000], [25], start=start) for start in (None, known))
        cold, warm = cold + plain.iterations[0], warm + begun.iterations[0]
        assert objective(sample, begun.centroids) >= objective(sample, plain.centroids) - 0.01
    assert warm < 0.8 * cold


def test_fewer_or_more_calibrated_centroids_than_clusters() -> None:
    points = blobs(1, 6, 20, noise=0.02, shuffled=False)
    middle = spherical_kmeans(points, [120], [6]).centroids[0]
    for start in (middle, torch.cat((-middle, middle), 1)):
        found = spherical_kmeans(points, [120], [6], start=start)
        assert torch.bincount(found.labels[0, 0], minlength=6).tolist() == [20] * 6
    held, tokens = torch.ones(1, 1, 120).bool(), [20, 60, 100]
    begun = kmeans._begin(F.normalize(points, dim=-1), held, [6], middle[:, 3:])
    assert sorted((begun[0, 0, :3] @ middle[0].T).argmax(-1).tolist()) == [3, 4, 5]
    torch.testing.assert_close(begun[0, 0, 3:], F.normalize(points[0, 0, tokens], dim=-1))


def test_it_begins_with_tokens_at_equal_distances() -> None:
    """Of a row of n tokens and C clusters those in the middle of C equal parts, whatever the rows beside it."""
    points = directions(2, 2, 60, 8)
    held = torch.arange(60) < torch.tensor([60, 33]).view(-1, 1, 1)
    begun = kmeans._begin(points, held, [6, 4], None)
    for row, tokens in enumerate(([5, 15, 25, 35, 45, 55], [4, 12, 20, 28])):
        assert torch.equal(begun[row, :, : len(tokens)], points[row, :, tokens])


@pytest.mark.parametrize("seed", range(4))
def test_no_cluster_is_empty_where_directions_suffice(seed: int) -> None:
    for lengths, counts in (((150, 40), (40, 40)), ((60, 20), (5, 2)), ((64, 9), (33, 9))):
        points = directions(2, 2, max(lengths), 8, seed=seed)
        points[:, :, ::3] = points[:, :, :1]  # a third are the same
        assert_filled(
            points, lengths, [min(count, length * 2 // 3) for count, length in zip(counts, lengths, strict=True)]
        )


def test_empty_clusters_are_seeded_again() -> None:
    """Centroids that attract nothing: opposite to all points, or all the same."""
    points = blobs(2, 6, 10, noise=0.02)
    same = points[0, :, :1].expand(-1, 6, -1)
    for start in (-points[0, :, :6], same, torch.zeros(1, 6, 16)):
        found = spherical_kmeans(points, [60, 60], [6, 6], start=start)
        for row in range(2):
            assert torch.bincount(found.labels[row, 0], minlength=6).min() > 0


def assert_filled(points: Tensor, lengths: Sequence[int], counts: Sequence[int]) -> None:
    found = spherical_kmeans(points, lengths, counts)
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        for labels in found.labels[row, :, :length]:
            assert torch.bincount(labels, minlength=count).min() > 0, f"of {count} for {length} tokens"
            assert labels.max() < count


def test_equal_points_and_zeros_are_finite() -> None:
    for points in (torch.ones(1, 1, 10, 4), torch.zeros(1, 1, 10, 4)):
        found = spherical_kmeans(points, [10], [3])
        assert found.centroids.isfinite().all() and found.labels.max() < 3


def test_deterministic() -> None:
    points = directions(2, 2, 100, 8)
    once, again = (spherical_kmeans(points, [100, 60], [9, 5]) for _ in range(2))
    assert torch.equal(once.labels, again.labels) and torch.equal(once.centroids, again.centroids)


@pytest.mark.parametrize("factor", [2.0**66, 2.0**-100, 2.0**120])
def test_directions_of_keys_whose_squares_float32_does_not_hold(factor):
    points = directions(1, 2, 60, 8)
    plain, found = (spherical_kmeans(keys, [60], [5]) for keys in (points, points * factor))
    assert torch.equal(found.labels, plain.labels) and torch.equal(found.centroids, plain.centroids)


def test_keys_without_a_direction():
    points = directions(1, 2, 60, 8)
    points[0, 1, 7] = 0
    points[0, :, 50:] = torch.nan  # beyond the row's length
    found = spherical_kmeans(points, [50], [5])
    torch.testing.assert_close(found.centroids.norm(dim=-1), torch.ones(1, 2, 5))
    for broken in (torch.nan, torch.inf):
        points[0, 1, 3, 2] = broken
        with pytest.raises(KvcalError, match="1 of 100 keys hold NaN or infinity"):
            spherical_kmeans(points, [50], [5])
