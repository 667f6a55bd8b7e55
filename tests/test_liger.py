"""Liger's kernels in place of a model's small operations: attention of a compressed cache is what it was."""

import copy

import pytest
import torch
from compressed import artifact, model, random_ids
from transformers.models.llama import modeling_llama

from kvcal.runtime import decode

liger = pytest.importorskip("liger_kernel.transformers")
REPLACED = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")


def test_a_step_is_what_it_was(monkeypatch):
    for name in REPLACED:  # they are put back afterwards
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    settings = {"rank": 0.5, "keep": 0.3, "sample": 16, "max_new_tokens": 6}
    plain, fused, ids = model(), copy.deepcopy(model()), random_ids(80)
    expected = decode(plain, ids, artifact(), "spectral", **settings)
    liger.apply_liger_kernel_to_llama(
        rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False, model=fused
    )
    found = decode(fused, ids, artifact(), "spectral", **settings)
    assert torch.equal(found.tokens, expected.tokens)
