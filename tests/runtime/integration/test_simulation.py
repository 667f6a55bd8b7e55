"""Decoding token by token through the cache equals one forward pass with Loki's selection written as masks."""

import math

import pytest
import torch
import torch.nn.functional as F
from architectures import build
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from kvcal.artifacts import Artifact
from kvcal.calibrate import calibrate
from kvcal.calibrate.blocks import TokenBlocks
from kvcal.runtime import CompressedCache

PREFIX, CONTINUATION = 40, 56


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture(scope="module")
def artifact(model) -> Artifact:
    ids = torch.randint(3, 96, (8, 64), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    every = torch.ones(8, 64, dtype=torch.bool)
    return calibrate(model, TokenBlocks(ids, every, every, {"id": "random"}), model_id="tiny")


def simulated(model, artifact, ids, rank, keep, basis, fraction_of=None):
    """Logits of one forward pass in which queries from PREFIX on see the tokens that Loki would choose, no others."""

    def attention(module, query, key, value, mask, scaling=None, **_):
        group = query.shape[1] // key.shape[1]
        layer = module.layer_idx
        if basis == "pca":
            maps = [artifact.tensor("pca", layer, "key_post.components")] * 2
        else:
            maps = [artifact.tensor("score", layer, f"post.{name}_map") for name in ("query", "key")]
        dims = math.ceil(rank * key.shape[-1])
        low_query = torch.einsum("hrd,bhgtd->bhgtr", maps[0][:, :dims], query.unflatten(1, (-1, group)))
        low_key = torch.einsum("hrd,bhsd->bhsr", maps[1][:, :dims], key)
        scores = torch.einsum("bhgtr,bhsr->bhgts", low_query, low_key).flatten(1, 2)
        tokens = key.shape[2]
        visible = torch.zeros_like(scores, dtype=torch.bool)
        for at in range(tokens):
            count = at + 1
            if at >= PREFIX:
                count = math.ceil(keep * (fraction_of or at + 1))
            best = scores[:, :, at, : at + 1].topk(min(count, at + 1)).indices
            visible[:, :, at].scatter_(-1, best, True)
        logits = (query @ key.repeat_interleave(group, 1).mT * scaling).masked_fill(~visible, -torch.inf)
        return (logits.softmax(-1) @ value.repeat_interleave(group, 1)).transpose(1, 2), None

    AttentionInterface.register("simulated_loki", attention)
    AttentionMaskInterface.register("simulated_loki", sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("simulated_loki")
    try:
        return model(ids, use_cache=False).logits
    finally:
        model.set_attn_implementation(before)
        del AttentionInterface._global_mapping["simulated_loki"]
        del AttentionMaskInterface._global_mapping["simulated_loki"]


def perplexity(logits, ids):
    continuation = logits[:, PREFIX - 1 : -1].flatten(0, 1).double()
    return math.exp(F.cross_entropy(continuation, ids[:, PREFIX:].flatten()))


@torch.no_grad()
@pytest.mark.parametrize("basis", ["pca", "score"])
def test_teacher_forced_perplexity_equals_a_mask_simulation_with_causal_budgets(model, artifact, basis):
    ids = torch.randint(3, 96, (2, PREFIX + CONTINUATION), generator=torch.Generator().manual_seed(2))
    cache = CompressedCache(model, artifact, "loki", rank=0.25, keep=0.2, basis=basis, select="head", sinks=0, recent=0)
    parts = [model(ids[:, :PREFIX], past_key_values=cache).logits]
    for at in range(PREFIX, ids.shape[1]):
        parts.append(model(ids[:, at : at + 1], past_key_values=cache).logits)
    found = perplexity(torch.cat(parts, 1), ids)
    assert found == pytest.approx(perplexity(simulated(model, artifact, ids, 0.25, 0.2, basis), ids), rel=1e-4)
    # What is told apart: dense attention, and budgets of the final length, as in published code.
    dense = perplexity(model(ids, use_cache=False).logits, ids)
    flattered = perplexity(simulated(model, artifact, ids, 0.25, 0.2, basis, fraction_of=ids.shape[1]), ids)
    assert abs(found / dense - 1) > 1e-3
    assert abs(found / flattered - 1) > 1e-3
