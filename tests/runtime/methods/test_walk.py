"""How far a decoded token walks: what a reader follows, and what a step costs beside its tensors."""

import sys
from pathlib import Path

import torch
from compressed import artifact, model, random_ids

import kvcal.runtime
from kvcal.runtime import CompressedCache

CALLS = 60
"""Of a layer; rows of 8 bits take nine more, which encode and decode them."""
ROOT = Path(kvcal.runtime.__file__).resolve().parents[1]
OURS = tuple(f"{ROOT / folder}/" for folder in ("calibrate", "runtime", "kernels", "artifacts"))


def calls_of(step):
    """(file, name) of each of our functions that is called."""
    found = []

    def see(frame, event, _):
        path = str(Path(frame.f_code.co_filename).resolve()) if event == "call" else ""
        if path.startswith(OURS):
            found.append((path, frame.f_code.co_name))

    sys.setprofile(see)
    try:
        step()
    finally:
        sys.setprofile(None)
    return found


@torch.no_grad()
def test_one_decoded_token_of_spectral_in_one_layer():
    cache = CompressedCache(model(), artifact(), "spectral", rank=0.5, keep=0.3, sample=16)
    out = model()(random_ids(80), past_key_values=cache)
    for _ in range(2):  # a first step makes what later ones have
        out = model()(out.logits[:, -1:].argmax(-1), past_key_values=cache)
    calls = calls_of(lambda: model()(out.logits[:, -1:].argmax(-1), past_key_values=cache))
    begin = max(at for at, (path, name) in enumerate(calls) if name == "update" and path.endswith("cache.py"))
    layer = [name for _, name in calls[begin:]]
    assert {"encode", "step", "_choose", "_read", "_residual"} <= set(layer)
    assert len(layer) <= CALLS, layer
