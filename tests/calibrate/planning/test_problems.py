"""What a plan takes from a model is the attention that the model computes."""

from __future__ import annotations

import pytest
import torch
import transformers
from architectures import build

from kvcal.calibrate.planning.points import problems


def soft_capped():
    of = build("gemma2")
    for module in attention_of(of):
        module.attn_logit_softcapping = 1.0
    return of


def with_sinks():
    torch.manual_seed(0)
    return transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            vocab_size=96,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_local_experts=2,
            num_experts_per_tok=1,
            sliding_window=8,
            pad_token_id=0,
            max_position_embeddings=128,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    ).eval()


def attention_of(of):
    return [module for module in of.modules() if hasattr(module, "layer_idx") and hasattr(module, "o_proj")]


@pytest.mark.parametrize("make", [lambda: build("llama"), soft_capped, with_sinks], ids=["plain", "softcap", "sinks"])
def test_dense_attention_is_the_models(make):
    """Of every full-attention layer, at its last tokens: what goes into the output projection."""
    of = make()
    inputs: dict[int, torch.Tensor] = {}
    handles = []
    for module in attention_of(of):

        def keep(_, args, layer=module.layer_idx):
            inputs[layer] = args[0]

        handles.append(module.o_proj.register_forward_pre_hook(keep))
    ids = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(0))
    found = problems(of, ids, steps=4, texts=2)
    for handle in handles:
        handle.remove()
    assert found
    for problem in found:
        dense = [output for *_, output in problem.steps()]
        ours = torch.cat(dense, 2).transpose(1, 2).flatten(2)
        torch.testing.assert_close(ours, inputs[problem.layer][:, -4:].float(), rtol=1e-4, atol=1e-5)
