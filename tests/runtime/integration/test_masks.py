"""No mask is made where nothing is hidden: in a captured step it would be made again by every replay."""

import pytest
import torch
from compressed import artifact, model, padded
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from kvcal.runtime import decode
from kvcal.runtime.integration.masks import needed_only
from kvcal.runtime.replay import Replay

KEPT = {"method": "loki", "basis": "pca", "rank": 0.5, "keep": 0.25, "select": "max"}


@pytest.fixture
def tracing(monkeypatch):
    """What transformers believes during a capture: every version then makes a mask, were it asked."""
    monkeypatch.setattr(masking_utils, "is_tracing", lambda *_: True)
    monkeypatch.setattr(masking_utils, "is_torchdynamo_exporting", lambda: True, raising=False)


class Operations(TorchDispatchMode):
    """The names of all operations of torch, whatever kernels they would take on a GPU."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def operations_of_a_step(monkeypatch):
    """Of the last of three: the ones before it fill workspaces."""
    steps, run = [], Replay.__call__

    def counted(replay, addresses):
        with Operations() as operations:
            run(replay, addresses)
        steps.append(operations.names)

    monkeypatch.setattr(Replay, "__call__", counted)
    decode(model(), artifact=artifact(), max_new_tokens=4, **padded(9, 23), **KEPT)
    assert len(steps) == 3
    return steps[-1]


def test_a_captured_step_makes_no_mask(monkeypatch, request):
    with monkeypatch.context() as patched:
        expected = operations_of_a_step(patched)
    request.getfixturevalue("tracing")
    with monkeypatch.context() as patched:
        assert operations_of_a_step(patched) == expected
    assert "aten.mm.default" in expected


def test_transformers_does_make_one_then(tracing):
    mask = masking_utils.sdpa_mask(batch_size=1, q_length=1, kv_length=9, q_offset=8)
    assert mask is not None and mask.shape[-1] == 9


@pytest.mark.parametrize(
    "asked",
    [
        {"q_length": 1},
        {"q_length": 1, "attention_mask": torch.tensor([[False, True, True, True, True]])},
        {"q_length": 1, "mask_function": masking_utils.sliding_window_causal_mask_function(3), "local_size": 3},
        {"q_length": 1, "allow_is_causal_skip": False},
        {"q_length": 2},
        {"q_length": 5},
    ],
    ids=lambda asked: ", ".join(asked),
)
def test_as_transformers_makes_them_outside_a_capture(asked):
    given = {
        "mask_function": masking_utils.causal_mask_function, "attention_mask": None, "batch_size": 1, "kv_length": 5,
        "kv_offset": 0, "q_offset": 5 - asked["q_length"], **asked,
    }  # fmt: skip
    expected = masking_utils.sdpa_mask(**given)
    mask = needed_only(masking_utils.sdpa_mask)(**given)
    assert (mask is None) == (expected is None)
    assert mask is None or torch.equal(mask, expected)
