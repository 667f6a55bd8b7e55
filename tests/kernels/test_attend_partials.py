"""Windows, tails and merges by themselves."""

import pytest
import torch
from attend_problem import Problem
from attention_oracle import NAN, make, poisoned_empty
from tolerances import assert_close

from kvcal.kernels.attend import merge, tail, unread, window

BOTH = pytest.mark.parametrize("backend", ["reference", "triton"])


@pytest.fixture(autouse=True)
def _no_workspace_is_zero(monkeypatch):
    monkeypatch.setattr(torch, "empty", poisoned_empty)


@BOTH
@pytest.mark.parametrize("splits", [None, 1, 3])
def test_windows_of_unequal_lengths(device, backend, splits):
    problem = Problem(device, [[0], [0], [0]], 1, group=2)
    problem.key, problem.value = problem.key.nan_to_num(0.5), problem.value.nan_to_num(-0.5)
    problem.begin = torch.tensor([3, 7, 100], dtype=torch.int32, device=device)
    problem.end = torch.tensor([3, 8, 200], dtype=torch.int32, device=device)
    for cache in (problem.key, problem.value):
        cache[0] = NAN
        cache[1, :, 8:], cache[2, :, :100] = NAN, NAN
    out, lse = problem.window(backend, scaling=0.125, splits=splits)
    assert (lse[0] == -torch.inf).all() and not out[0].any()
    merged = merge(problem.query, [(out, lse)], backend=backend)
    assert_close(merged, problem.expected("near", scaling=0.125))
    masses = problem.key[2, 0, 100:].double() @ problem.query[2, 0].double().T * 0.125
    assert_close(lse[2, 0].logsumexp(-1), masses.exp().sum(0).log())


@BOTH
def test_a_tail_whose_unread_tokens_differ_between_query_heads(device, backend):
    problem = Problem(device, [[0, 0]], 1, width=32, clusters=70)
    problem.mean_key, problem.mean_value = problem.mean_key.nan_to_num(1.0), problem.mean_value.nan_to_num(1.0)
    problem.unread = (torch.arange(1 * 2 * 4 * 70, device=device) % 5).float().view(1, 2, 4, 70)
    problem.unread[0, 1, 2] = 0
    part = problem.tail(backend, scaling=0.125)
    out = merge(problem.query, [part], backend=backend)
    assert_close(out, problem.expected("far", scaling=0.125))
    assert not out[0, 1, 2].any()


@BOTH
@pytest.mark.parametrize("each", [False, True], ids=["by KV head", "by query head"])
def test_what_a_selection_leaves_of_each_cluster(device, backend, each):
    """Counted one token at a time; owners of slots that are in no cluster are beyond all clusters."""
    generator = torch.Generator().manual_seed(4)
    begin, end, clusters, capacity = [2, 0, 3], [1500, 40, 3], 77, 1600
    owner = torch.full((3, 2, capacity), 2**30, dtype=torch.int32)
    sizes = torch.zeros(3, 2, clusters, dtype=torch.int32)
    for row in range(3):
        of = torch.randint(0, clusters - 1, (2, end[row] - begin[row]), generator=generator, dtype=torch.int32)
        owner[row, :, begin[row] : end[row]] = of
        sizes[row].scatter_add_(1, of.long(), torch.ones_like(of))
    groups = (3, 2, 3) if each else (3, 2)
    index = torch.rand(*groups, capacity, generator=generator).argsort(-1)[..., :1200].int()
    count = torch.randint(0, 1300, groups, generator=generator, dtype=torch.int32)
    count.view(-1)[0] = 1200
    expected = (sizes.unsqueeze(2).expand(3, 2, 3, -1) if each else sizes).double().clone()
    for number, (slots, most) in enumerate(zip(index.view(-1, 1200).tolist(), count.flatten().tolist(), strict=True)):
        pair = number // (3 if each else 1)
        for slot in slots[:most]:
            if begin[pair // 2] <= slot < end[pair // 2]:
                expected.view(-1, clusters)[number, owner[pair // 2, pair % 2, slot]] -= 1
    limits = (torch.tensor(of, dtype=torch.int32, device=device) for of in (begin, end))
    out = torch.full((*groups, clusters), NAN, device=device)
    operands = (of.to(device) for of in (index, count, owner, sizes))
    assert unread(*operands, *limits, out=out, backend=backend) is out
    assert torch.equal(out.double().cpu(), expected) and (expected >= 0).all()


def test_owners_fit_the_index():
    ints = torch.zeros(1, 2, 8, dtype=torch.int32)
    row, count = ints[:, 0, 0].contiguous(), ints[..., 0].contiguous()
    for change, message in [
        ({"owner": ints[:, :1]}, r"owner: received shape \(1, 1, 8\) for an index \(1, 2, 8\)"),
        ({"owner": ints.long()}, "owner: received torch.int64"),
        ({"owner": ints[..., ::2]}, "owner: received stride 2"),
        ({"sizes": ints.float()}, "sizes: received torch.float32"),
        ({"begin": count}, r"begin: received torch.int32 \[1, 2\]"),
    ]:
        operands = {"index": ints, "count": count, "owner": ints, "sizes": ints, "begin": row, "end": row}
        with pytest.raises(ValueError, match=message):
            unread(**operands | change)


@BOTH
def test_a_merge_takes_any_number_of_partials_and_skips_empty_ones(device, backend):
    generator = torch.Generator().manual_seed(2)
    query = make(generator, 2, 1, 3, 16, dtype=torch.float16).to(device)
    outs = make(generator, 2, 1, 3, 75, 40).to(device)
    lse = make(generator, 2, 1, 3, 75).to(device) * 3
    lse[:, :, 1, 3], outs[:, :, 1, 3] = -torch.inf, NAN
    cuts = ((0, 66), (66, 66), (66, 71), (71, 75))
    out = merge(query, [(outs[..., a:b, :], lse[..., a:b]) for a, b in cuts], backend=backend)
    mass = lse.double().exp().unsqueeze(-1)
    assert_close(out, (mass * outs.double()).nan_to_num(0).sum(3) / mass.sum(3))


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="long rows take a GPU")


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_windows_of_131072(device, dtype):
    problem = Problem(device, [[0, 0], [0, 0]], 1, capacity=131072, dtype=dtype)
    problem.key, problem.value = problem.key.nan_to_num(0.5), problem.value.nan_to_num(-0.5)
    problem.begin = torch.tensor([1, 131000], dtype=torch.int32, device=device)
    problem.end = torch.tensor([131072, 131072], dtype=torch.int32, device=device)
    out = merge(problem.query, [problem.window("triton", scaling=0.125)], backend="triton")
    assert_close(out, problem.expected("near", scaling=0.125), dtype)


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_tail_of_131072_clusters(device, dtype):
    problem = Problem(device, [[0, 0]], 1, clusters=131072, dtype=dtype)
    out = merge(problem.query, [problem.tail("triton", scaling=0.125)], backend="triton")
    assert_close(out, problem.expected("far", scaling=0.125), dtype)


@on_a_gpu
def test_more_groups_than_the_second_axis_of_a_grid_has(device):
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = (torch.randn(9000, 8, count, 16, generator=generator, device=device) for count in (2, 12, 12))
    begin = torch.randint(0, 5, (9000,), generator=generator, device=device, dtype=torch.int32)
    unread = torch.randint(1, 5, (9000, 8, 2, 12), generator=generator, device=device).float()
    for part in (
        lambda backend: window(query, key, value, begin, begin + 7, scaling=0.2, backend=backend),
        lambda backend: tail(query, key, value, unread, scaling=0.2, backend=backend),
    ):
        out, expected = (merge(query, [part(backend)], backend="reference") for backend in ("triton", "reference"))
        assert_close(out, expected.double())
