"""The part `reservoir` of benchmarks/real: smaller samples are those of smaller reservoirs, and its table."""

import torch
from architectures import build

from benchmarks.real import reservoir
from kvcal.calibrate.blocks import TokenBlocks
from kvcal.calibrate.one_pass import calibrate


def calibrated(reservoir):
    ids = torch.randint(3, 96, (4, 32), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    every = torch.ones(4, 32, dtype=torch.bool)
    return calibrate(build("llama"), TokenBlocks(ids, every, every, {"id": "random"}), reservoir=reservoir, seed=5)


def test_a_smaller_sample_is_what_a_smaller_reservoir_keeps():
    found = reservoir.sampled(calibrated(64), 20).stages["reservoir"].tensors
    wanted = calibrated(20).stages["reservoir"].tensors
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_other_draws_are_others_of_the_same_tokens():
    whole = calibrated(64)
    tokens = [reservoir.sampled(whole, 20, draw).stages["reservoir"].tensors["token"] for draw in range(3)]
    assert len({tuple(drawn.tolist()) for drawn in tokens}) == 3
    for drawn in tokens:
        assert bool(torch.isin(drawn, whole.stages["reservoir"].tensors["token"]).all())
        assert bool((drawn[1:] > drawn[:-1]).all())


def test_rows_are_paired_with_the_largest_sample_by_text():
    """Means of samples by text are 3 and 5 against 1 and 2: 2.5 more, with a standard error of 0.5."""
    part = reservoir
    by_text = {name: [1.0, 2.0] for name in part.COLUMNS} | {"silhouette": 0.25, "key_r2": 0.5, "value_r2": 0.5}
    largest = by_text | {"cost_aligned": 0.5}
    found = {f"{part.LARGEST}, draw 0": largest}
    for draw, texts in enumerate(([2.0, 4.0], [3.0, 5.0], [4.0, 6.0])):
        found[f"512, draw {draw}"] = largest | {"keys": texts}
    small, whole = part.rows(found)
    column = list(part.COLUMNS).index("keys") + 1
    assert (small[0], small[column]) == ("512", "4.0000 ± 1.0000 (+2.5000 ± 0.5000)")
    assert (whole[0], whole[column]) == (str(part.LARGEST), "1.5000 ± .5000")
    assert small[list(part.COLUMNS).index("silhouette") + 1] == "0.250"
    assert part.rows({name: row for name, row in found.items() if name != "512, draw 2"}) == [whole]
