"""A decoded token of `spectral` takes few calls of our functions in a layer: what a reader follows, and what a step
costs beside its tensors."""

import sys
from pathlib import Path

import pytest
import torch
from compressed import artifact, model, random_ids

import kvcal.runtime
from kvcal.runtime import CompressedCache

ROOT = Path(kvcal.runtime.__file__).resolve().parents[1]
OURS = tuple(f"{ROOT / folder}/" for folder in ("calibrate", "runtime", "kernels", "artifacts"))


def calls_of(step):
    """(file, name) of each of our functions that is called."""
    found = []

    def see(frame, event, _):
        path = str(Path(frame.f_code.co_filename).resolve()) if event == "call" else ""
        if path.startswith(OURS):
            found.append((path, frame.f_code.co_name))

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        step()
    finally:
        sys.setprofile(before)
    return found


@pytest.mark.parametrize(("rows", "most"), [(16, 54), (8, 53)])
@torch.no_grad()
def test_calls_of_a_decoded_token_in_a_layer(rows, most):
    cache = CompressedCache(model(), artifact(), "spectral", rank=0.5, keep=0.3, rows=rows, sample=16)
    out = model()(random_ids(80), past_key_values=cache)
    for _ in range(2):  # a first step makes what later ones have
        out = model()(out.logits[:, -1:].argmax(-1), past_key_values=cache)
    calls = calls_of(lambda: model()(out.logits[:, -1:].argmax(-1), past_key_values=cache))
    begin = max(at for at, (path, name) in enumerate(calls) if name == "update" and path.endswith("cache.py"))
    layer = [name for _, name in calls[begin:]]  # the last one's: nothing of ours follows it
    assert {"append", "step", "scan"} <= set(layer)
    assert len(layer) <= most, " ".join(layer)
