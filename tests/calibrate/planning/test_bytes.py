"""What a plan predicts to read is what decoding reads, also where layers with a sliding window stand between."""

from __future__ import annotations

import pytest
import torch
from compressed import artifact, model

from kvcal.calibrate.evaluation.prompts import Prompts, Windows
from kvcal.calibrate.planning.body import dense_bytes, share_read
from kvcal.calibrate.planning.plan import evaluated
from kvcal.calibrate.planning.points import problems
from kvcal.calibrate.planning.subject import Subject
from kvcal.runtime import CompressedCache

ROWS, PREFIX, STEPS = 4, 40, 6
SETTINGS = [
    {"method": "spectral", "rank": 16, "bits": 2, "rows": 8, "keep": 0.2},
    {"method": "exact_topk", "keep": 5},
    {"method": "full"},
]


@pytest.mark.parametrize("name", ["llama", "gemma2"], ids=["all layers", "some layers"])
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting["method"])
def test_predicted_bytes_are_measured_bytes(name, setting):
    of, fitted = model(name), artifact(name)
    ids = torch.randint(3, 90, (ROWS, PREFIX + STEPS + 1), generator=torch.Generator().manual_seed(0))
    found = problems(of, ids[:, : PREFIX + STEPS], STEPS, ROWS)
    assert len(found) == len(CompressedCache(of, None, "full").stores) == len(fitted.full_layers)
    predicted = [problem.measure(setting, fitted, ROWS).bytes for problem in found]
    layers = [problem.layer for problem in found]
    methods = [setting if layer in layers else {"method": "full"} for layer in range(3)]
    windows = Windows(ids, PREFIX)  # its last token is not decoded, only predicted
    subject = Subject(of, fitted, batch_size=ROWS)
    full, row = evaluated(subject, Prompts(windows, ()), [{"method": "full"}, {"method": methods}])
    dense = dense_bytes(fitted, windows, torch.float32)
    measured = share_read(row["bytes_per_step"], full["bytes_per_step"], dense)
    assert measured == pytest.approx(sum(predicted) / len(predicted), rel=1e-9)
    held = sum(range(PREFIX + 1, PREFIX + STEPS + 1)) / STEPS
    assert dense == len(found) * held * 2 * 2 * 16 * 4  # KV heads, keys and values, dimensions, bytes of each
    if name == "llama":
        assert full["bytes_per_step"] == dense
