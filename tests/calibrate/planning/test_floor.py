"""The least that a method reads, against its bytes by hand."""

from __future__ import annotations

import dataclasses
import math

import coded
import pytest
import torch

from kvcal.artifacts import KvcalError
from kvcal.calibrate.planning import settings
from kvcal.calibrate.planning.floor import SLACK, Floor, check, floor

PREFIX, BATCH, DIM, HEADS = 2048, 4, 32, 2


def artifact():
    found = coded.artifact(DIM, HEADS)
    return dataclasses.replace(found, layers=(dataclasses.replace(found.layers[0], value_dim=DIM),))


def test_the_cheapest_spectral_setting_is_that_of_the_formula():
    """Per token and head a code of 16 dimensions in 2 bits, its scale, a codeword's number; of each page a correction
    in 8 bits with its scale; of each token that is read key, value and two scales. Per step codewords and maps."""
    found = floor(artifact(), "spectral", PREFIX, BATCH, torch.float32)
    tokens = PREFIX + 1
    codes = tokens * (16 // 4 + 2 + 1) + tokens // 64 * (DIM + 2)
    rows = math.ceil(min(settings.KEEP) * tokens) * (2 * DIM + 2 * 2)
    words = 2 * coded.CODEWORDS * (2 * DIM + 2 * DIM + 1) + 2 * 2 * DIM * 16
    dense = tokens * 2 * DIM * 4
    assert found.of(PREFIX) == pytest.approx((codes + rows + words / BATCH) / dense, rel=0.02)  # a sampled choice


@pytest.mark.parametrize("method", ["spectral", "loki"])
def test_a_longer_prefix_is_foretold(method):
    """From two lengths to a third."""
    near, far = (floor(artifact(), method, prefix, 1, torch.bfloat16) for prefix in (1024, 4096))
    assert near.of(4096) == pytest.approx(far.of(4096), rel=0.05)


def test_what_is_said_suffices():
    of = Floor(0.05, 20.0)
    with pytest.raises(KvcalError) as caught:
        check(of, 0.06, 512, 8, "spectral", 8192)
    assert str(caught.value) == (
        "--bytes 0.06: the cheapest settings of spectral read 0.0891 of dense attention's bytes after 512 tokens, in "
        "batches of 8: give --bytes 0.0909 or --prefix 2304, or more"
    )
    check(of, 0.0909, 512, 8, "spectral", 8192)
    check(of, 0.06, 2304, 8, "spectral", 8192)


@pytest.mark.parametrize(("budget", "most"), [(0.05 * SLACK, None), (0.06, 2048)], ids=["never", "beyond the model"])
def test_no_prefix_is_named_that_does_not_do(budget, most):
    with pytest.raises(KvcalError, match=r"give --bytes 0\.0909 or more$"):
        check(Floor(0.05, 20.0), budget, 512, 8, "spectral", most)
