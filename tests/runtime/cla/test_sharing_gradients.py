"""What is trained gets the gradients that an oracle of hooks gets, and nothing else gets any."""

import pytest
import torch
from cla_oracle import GROUPS, SHARING, WHOLE, groups_of, inventory, oracle, several
from compressed import random_ids

from kvcal.runtime.cla import SharingMap, shared

IDS = torch.cat((random_ids(21), random_ids(21, seed=1)))
CLOSE = {"rtol": 1e-3, "atol": 1e-5}
"""Gradients are sums over layers and tokens, in another order."""


def loss(of, ids=IDS):
    return of(ids, labels=ids).loss


def with_gradient(of):
    return {name: p.grad for name, p in of.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", SHARING)
def test_gradients_of_all_are_those_of_the_oracle(name):
    of, original = several(name), several(name)
    expected = oracle(of, groups_of(GROUPS[name]), name)
    loss(expected).backward()
    with shared(of, SharingMap.parse(GROUPS[name]), trainable="all") as sharing:
        loss(of).backward()
        assert with_gradient(of).keys() == sharing.parameters.keys() == dict(of.named_parameters()).keys()
        wanted = with_gradient(expected)
        for key, found in with_gradient(of).items():
            if "k_norm" not in key and found.shape == wanted[key].shape:  # of the norm the oracle has one per layer
                torch.testing.assert_close(found, wanted[key], **CLOSE)
    assert not with_gradient(of)
    for key, parameter in of.named_parameters():
        assert torch.equal(parameter, original.get_parameter(key)), key


def test_gradients_of_a_shared_norm_of_keys_are_those_of_all_its_layers():
    of = several("qwen3")
    expected = oracle(of, [[0, 1], [2]], "qwen3")
    loss(expected).backward()
    wanted = sum(expected.get_parameter(f"model.layers.{layer}.self_attn.k_norm.weight").grad for layer in (0, 1))
    with shared(of, SharingMap.parse("0-1,2"), trainable="all") as sharing:
        loss(of).backward()
        torch.testing.assert_close(sharing.parameters["model.layers.0.self_attn.k_norm.weight"].grad, wanted, **CLOSE)


EXPECTED = {
    "llama": {
        0: ["self_attn.k_proj.weight", "self_attn.v_proj.weight"],
        1: ["self_attn.q_proj.weight", "input_layernorm.weight", "post_attention_layernorm.weight"],
    },
    "qwen3": {
        0: ["self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.k_norm.weight"],
        1: [
            "self_attn.q_proj.weight",
            "self_attn.q_norm.weight",
            "input_layernorm.weight",
            "post_attention_layernorm.weight",
        ],
    },
    "qwen2": {
        0: [f"self_attn.{part}_proj.{kind}" for part in "kv" for kind in ("weight", "bias")],
        1: [
            "self_attn.q_proj.weight",
            "self_attn.q_proj.bias",
            "input_layernorm.weight",
            "post_attention_layernorm.weight",
        ],
    },
    "phi3": {
        0: ["self_attn.qkv_proj.weight"],
        1: ["self_attn.qkv_proj.weight", "input_layernorm.weight", "post_attention_layernorm.weight"],
    },
}


@pytest.mark.parametrize("name", EXPECTED)
def test_of_shared_only_the_shared_projections_and_the_readers_queries_and_norms_are_trained(name):
    of = several(name)
    names = {f"model.layers.{layer}.{key}" for layer, keys in EXPECTED[name].items() for key in keys}
    with shared(of, SharingMap.parse("0-1,2"), trainable="shared") as sharing:
        loss(of).backward()
        assert with_gradient(of).keys() == sharing.parameters.keys() == names
        assert {key for key, parameter in of.named_parameters() if parameter.requires_grad} == names
        wanted = oracle(several(name), [[0, 1], [2]], name)
        loss(wanted).backward()
        for key, parameter in sharing.parameters.items():
            gradient = wanted.get_parameter(key).grad
            if "k_norm" not in key and parameter.shape == gradient.shape:  # of the norm the oracle has one per layer
                torch.testing.assert_close(parameter.grad, gradient, **CLOSE)


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize("trainable", ["shared", "attention", "all"])
def test_steps_of_an_optimizer_lower_the_loss_and_leave_the_original_alone(name, trainable):
    of, before = several(name), {key: p.clone() for key, p in several(name).named_parameters()}
    state = inventory(of)
    of.train()
    with shared(of, SharingMap.parse(WHOLE[name]), trainable=trainable) as sharing:
        optimizer = torch.optim.Adam(sharing.parameters.values(), lr=1e-2)
        losses = []
        for _ in range(5):
            losses.append(loss(of))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
    assert losses[-1] < losses[0]
    of.eval()
    assert inventory(of) == state
    assert all(torch.equal(parameter, before[key]) for key, parameter in of.named_parameters())


def test_what_is_not_trained_gets_no_gradient():
    of = several("llama").requires_grad_(False)
    with shared(of, SharingMap.parse("0-1,2")):
        assert not of(IDS).logits.requires_grad
