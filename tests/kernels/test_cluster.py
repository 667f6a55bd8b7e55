"""`assign` and `update` against float64: the largest dot product, the lowest index among equals, sums of members."""

import pytest
import torch
import torch.nn.functional as F
from compiling import compiled
from tolerances import assert_close

import kvcal.kernels.cluster as cluster
from kvcal.kernels.cluster import assign, update
from kvcal.runtime.methods.kmeans import spherical_kmeans

BOTH = pytest.mark.parametrize("backend", ["triton", "reference"])
CASES = pytest.mark.parametrize(
    ("dtype", "dims", "tokens", "clusters"),
    [
        (torch.float32, 128, 150, 40),
        (torch.float32, 80, 129, 33),
        (torch.float16, 64, 300, 100),
        (torch.bfloat16, 96, 63, 7),
        (torch.bfloat16, 256, 40, 17),
        (torch.float32, 512, 70, 18),
        (torch.float32, 8, 1, 1),
    ],
    ids=str,
)
NEAR = 1e-6
"""Of cosines: centroids of unit length closer than this may stand for each other in float32."""
POISON = -7
_empty = torch.empty


@pytest.fixture(autouse=True)
def _no_result_is_zero(monkeypatch):
    """What is never written shows, as NaN or `POISON`."""

    def poisoned(*shape, **options):
        tensor = _empty(*shape, **options)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else POISON)

    monkeypatch.setattr(torch, "empty", poisoned)


def integers(*numbers, device="cpu"):
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def directions(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(shape, generator=generator) + 0.3, dim=-1).to(dtype)


def assert_nearest(result, unit, centroids, lengths, counts):
    label, similarity = (tensor.cpu() for tensor in result)
    assert label.dtype == torch.int32 and similarity.dtype == torch.float32
    for sequence, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        products = unit[sequence, :, :length].double().cpu() @ centroids[sequence, :, :count].double().cpu().mT
        mine = label[sequence, :, :length].long()
        assert ((mine >= 0) & (mine < count)).all()
        best = products.max(-1)
        assert_close(similarity[sequence, :, :length], best.values)
        of_mine = products.gather(-1, mine.unsqueeze(-1)).squeeze(-1)
        assert ((mine == best.indices) | (best.values - of_mine < NEAR)).all()
        assert (label[sequence, :, length:] == -1).all() and (similarity[sequence, :, length:] == 0).all()


@BOTH
@CASES
def test_the_nearest_centroid(device, backend, dtype, dims, tokens, clusters):
    lengths, counts = [tokens, max(1, tokens // 3)], [clusters, max(1, clusters // 2)]
    unit = directions(2, 2, tokens, dims, dtype=dtype).to(device)
    centroids = directions(2, 2, clusters, dims, dtype=dtype, seed=1).to(device)
    for sequence in range(2):  # what lies beyond a sequence is never used
        unit[sequence, :, lengths[sequence] :] = torch.nan
        centroids[sequence, :, counts[sequence] :] = torch.nan
    limits = integers(*lengths, device=device), integers(*counts, device=device)
    result = assign(unit, centroids, *limits, backend=backend)
    assert_nearest(result, unit, centroids, lengths, counts)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_of_equal_centroids_the_lowest(device, backend, dtype):
    """Copies in other columns of the same tile, and in other tiles of the kernel; and keys of zeros, alike to all.

    Of coordinates ±1/8, so that copies have the same product in whatever order a library adds.
    """
    unit = (directions(1, 1, 50, 64) - 0.3 / 8).sign().div(8).to(dtype).to(device)
    few = unit[:, :, :5]
    centroids = torch.cat((few, few.flip(2), *[few] * 20), 2)
    unit = torch.cat((unit, torch.zeros_like(few)), 2)
    label, similarity = assign(
        unit, centroids, integers(55, device=device), integers(110, device=device), backend=backend
    )
    assert label[0, 0, :5].tolist() == [0, 1, 2, 3, 4] and label.max() <= 4
    assert label[0, 0, 50:].tolist() == [0] * 5 and (similarity[0, 0, 50:] == 0).all()


@BOTH
def test_float32_is_told_apart_where_half_precision_is_not(device, backend):
    """Centroids 2^-15 apart in direction: below what float16 holds, above what is left of float32."""
    step = 2.0**-15
    angle = torch.arange(64, dtype=torch.float64) * step + 0.3
    centroids = torch.stack((angle.cos(), angle.sin()), -1)
    centroids = F.pad(centroids, (0, 14)).float().view(1, 1, 64, 16).to(device)
    away = angle + torch.pi / 2 - 0.001  # nearly orthogonal, so that the cosine changes by about a step
    unit = F.pad(torch.stack((away.cos(), away.sin()), -1), (0, 14)).float().view(1, 1, 64, 16).to(device)
    label, similarity = assign(
        unit, centroids, integers(64, device=device), integers(64, device=device), backend=backend
    )
    products = unit.double() @ centroids.double().mT
    assert_close(similarity, products.amax(-1))
    assert (label.long().cpu() == products.argmax(-1).cpu()).all()


@BOTH
@CASES
def test_sums_and_sizes_of_members(device, backend, dtype, dims, tokens, clusters):
    lengths, clusters = [tokens, max(1, tokens // 3)], -(-clusters // 6)
    generator = torch.Generator().manual_seed(3)
    values = (30 * torch.randn(2, 2, tokens, dims, generator=generator)).to(dtype)
    labels = torch.randint(-1, clusters + 1, (2, 2, tokens), generator=generator, dtype=torch.int32)
    labels[labels == clusters // 2] = 0  # an empty one, and labels -1 and C that count nowhere
    sums = torch.zeros(2, 2, clusters, dims, dtype=torch.float64)
    sizes = torch.zeros(2, 2, clusters, dtype=torch.int32)
    for sequence, head, token in ((b, h, t) for b in range(2) for h in range(2) for t in range(lengths[b])):
        label = int(labels[sequence, head, token])
        if 0 <= label < clusters:
            sums[sequence, head, label] += values[sequence, head, token].double()
            sizes[sequence, head, label] += 1
    values[1, :, lengths[1] :] = torch.nan
    added, members = update(
        values.to(device), labels.to(device), integers(*lengths, device=device), clusters, backend=backend
    )
    assert members.dtype == torch.int32 and torch.equal(members.cpu(), sizes)
    assert added.dtype == torch.float32
    assert_close(added, sums)


def test_one_cluster_of_many_tokens(device, monkeypatch):
    """Several tiles of labels and of members, several groups of clusters, and clusters without any."""
    from kvcal.kernels.cluster import triton_kernel

    monkeypatch.setattr(triton_kernel, "SCAN", 64)
    monkeypatch.setattr(triton_kernel, "ROWS", 16)
    values = directions(1, 1, 300, 16).to(device)
    labels = torch.full((1, 1, 300), 2, dtype=torch.int32, device=device)
    labels[..., 100:110] = 0
    labels[..., 285:] = 5
    sums, sizes = update(values, labels, integers(290, device=device), 7, backend="triton")
    assert sizes.tolist() == [[[10, 0, 275, 0, 0, 5, 0]]]
    members = torch.cat((values[0, 0, :100], values[0, 0, 110:285])).double().sum(0)
    assert_close(sums[0, 0, 2], members)
    assert_close(sums[0, 0, 0], values[0, 0, 100:110].double().sum(0))
    assert_close(sums[0, 0, 5], values[0, 0, 285:290].double().sum(0))
    assert (sums[0, 0, [1, 3, 4, 6]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sequence_alone_gives_the_same_bits(device, dtype):
    lengths, counts = [140, 9, 131], [34, 2, 9]
    unit, centroids = directions(3, 1, 140, 32, dtype=dtype).to(device), directions(3, 1, 34, 32, dtype=dtype, seed=1)
    centroids = centroids.to(device)
    limits = integers(*lengths, device=device), integers(*counts, device=device)
    label, similarity = assign(unit, centroids, *limits, backend="triton")
    sums, sizes = update(unit, label, limits[0], 34, backend="triton")
    for sequence, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        mine = unit[sequence : sequence + 1, :, :length]
        limits = integers(length, device=device), integers(count, device=device)
        alone = assign(mine, centroids[sequence : sequence + 1, :, :count], *limits, backend="triton")
        for whole, part in zip((label, similarity), alone, strict=True):
            assert torch.equal(whole[sequence, :, :length], part[0])
        alone = update(mine, alone[0], limits[0], count, backend="triton")
        for whole, part in zip((sums, sizes), alone, strict=True):
            assert torch.equal(whole[sequence, :, :count], part[0])


def test_keys_may_be_a_part_of_larger_tensors(device):
    wide = torch.full((3, 2, 47, 81), torch.nan, device=device)
    unit = wide[1:, :, 3:43, 5:37]
    unit.copy_(directions(2, 2, 40, 32))
    centroids = directions(2, 2, 18, 32, seed=1).to(device)
    limits = integers(40, 21, device=device), integers(18, 11, device=device)
    result = assign(unit, centroids[:, :, ::2], limits[0], integers(9, 5, device=device), backend="triton")
    assert_nearest(result, unit, centroids[:, :, ::2], [40, 21], [9, 5])
    view, copy = (update(keys, result[0], limits[0], 9, backend="triton") for keys in (unit, unit.contiguous()))
    assert torch.equal(view[0], copy[0]) and torch.equal(view[1], copy[1])


def test_k_means_on_the_kernels_is_k_means(device, monkeypatch):
    """Well-separated bundles, so that no rounding changes a label; calibrated centroids and empty clusters with it."""
    middle = directions(2, 1, 6, 1, 16)
    points = (middle + 0.02 * torch.randn(2, 1, 6, 20, 16, generator=torch.Generator().manual_seed(1))).flatten(2, 3)
    start = torch.cat((points[0, :, ::40], -points[0, :, ::40]), 1)
    for known in (None, start):
        expected = spherical_kmeans(points, [120, 100], [6, 5], start=known)
        with monkeypatch.context() as patch:
            patch.setattr(cluster, "choose", lambda *_: "triton")
            found = spherical_kmeans(points.to(device), [120, 100], [6, 5], start=known)
        assert found.iterations == expected.iterations
        for sequence, length in enumerate((120, 100)):
            assert torch.equal(found.labels[sequence, :, :length].cpu(), expected.labels[sequence, :, :length])
        assert_close(found.centroids, expected.centroids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unit": torch.zeros(2, 2, 8, 16).double()}, "unit: received torch.float64"),
        ({"unit": torch.zeros(2, 2, 8, 32)[..., ::2]}, "unit: received stride 2 along D, expected 1"),
        ({"unit": torch.zeros(2, 2, 8, 513)}, "unit: received 513 dimensions, expected at most 512"),
        ({"centroids": torch.zeros(2, 1, 4, 16)}, r"centroids: received \[2, 1, 4, 16\], expected \[2, 2, C, 16\]"),
        (
            {"centroids": torch.zeros(2, 2, 4, 16).half()},
            "centroids: received torch.float16 on cpu, expected torch.float32",
        ),
        ({"lengths": torch.tensor([8, 8])}, "lengths: received torch.int64"),
        ({"counts": integers(4)}, r"counts: received torch.int32 \[1\]"),
    ],
)
def test_bad_arguments_of_assign_are_named(changes, message):
    arguments = {
        "unit": torch.zeros(2, 2, 8, 16), "centroids": torch.zeros(2, 2, 4, 16),
        "lengths": integers(8, 8), "counts": integers(4, 4),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        assign(**arguments | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": torch.zeros(2, 8, 16)}, r"values: received torch.float32 \[2, 8, 16\]"),
        ({"labels": torch.zeros(2, 2, 8).long()}, "labels: received torch.int64"),
        ({"lengths": integers(8)}, r"lengths: received torch.int32 \[1\]"),
        ({"count": 0}, "count: received 0, expected at least 1"),
    ],
)
def test_bad_arguments_of_update_are_named(changes, message):
    arguments = {
        "values": torch.zeros(2, 2, 8, 16), "labels": integers(*[0] * 32).view(2, 2, 8),
        "lengths": integers(8, 8), "count": 4,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        update(**arguments | changes)


def test_compiles_for_hopper_without_spilling_and_once_for_all_sizes():
    pytest.importorskip("triton")
    launches = compiled("""
import torch
from kvcal.kernels.cluster import assign, update
def launch(tokens, clusters, dtype=torch.float32):
    unit, centroids = torch.zeros(1, 8, tokens, 128, dtype=dtype), torch.zeros(1, 8, clusters, 128, dtype=dtype)
    lengths = torch.ones(1, dtype=torch.int32)
    label, _ = assign(unit, centroids, lengths, lengths, backend="triton")
    update(unit, label, lengths, clusters, backend="triton")
for sizes in ((8, 1), (1000, 63), (8192, 512)):
    launch(*sizes)
launch(8192, 512, torch.bfloat16)
""")
    assert all(launch["stack"] == 0 for launch in launches), launches
    assert len({launch["hash"] for launch in launches[:6]}) == 2
    # Two programs of 256 threads fit on a multiprocessor: 65536 registers, 227 KB of shared memory.
    assert all(launch["registers"] <= 128 and launch["shared"] <= 113 * 1024 for launch in launches), launches


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dims", [64, 128, 256, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whole_segments_replayed_from_a_cuda_graph(device, dtype, dims):
    unit = directions(2, 8, 8192, dims, dtype=dtype).to(device)
    centroids = directions(2, 8, 512, dims, dtype=dtype, seed=1).to(device)
    lengths, counts = integers(8192, 1, device=device), integers(512, 1, device=device)

    def step():
        found = assign(unit, centroids, lengths, counts)
        return found, update(unit, found[0], lengths, 512)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found, added = step()
    for now, many in (([8192, 1], [512, 1]), ([4097, 8191], [51, 500])):
        lengths.copy_(integers(*now)), counts.copy_(integers(*many))
        graph.replay()
        assert_nearest(found, unit, centroids, now, many)
        once = [tensor.clone() for tensor in added]
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(once, added, strict=True))
        held = torch.arange(8192, device=device) < lengths.view(-1, 1, 1)
        members = unit.double() * held.unsqueeze(-1)
        index = found[0].long().clamp_min(0).unsqueeze(-1).expand_as(unit)
        sums = torch.zeros(2, 8, 512, dims, dtype=torch.float64, device=device).scatter_add_(2, index, members)
        assert_close(added[0], sums)
        assert (added[1].sum(-1) == lengths.view(-1, 1)).all()
