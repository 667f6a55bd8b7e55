"""What cannot share says why, in one line, and is left as it was."""

import pytest
import torch
import transformers
from cla_oracle import inventory, several
from compressed import CLOSE, model, random_ids, small, step_logits
from torch import nn

from kvcal.artifacts import KvcalError
from kvcal.runtime import CompressedCache, compress
from kvcal.runtime.cla import SharingMap, share, shared

TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def tiny(config, **settings):
    config = getattr(transformers, config)(**{**TINY, **settings})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def refused(of, text, message, **settings):
    before = inventory(of)
    with pytest.raises(KvcalError, match=message) as caught:
        share(of, SharingMap.parse(text), **settings)
    assert "\n" not in str(caught.value)
    assert inventory(of) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0-1", "layers 2 are in none"),
        ("0-1,2-3", "this model has layers 0 to 2"),
        ("0+2,1", "no neighbours"),
    ],
)
def test_patterns_that_do_not_cover_the_layers(text, message):
    refused(several("llama"), text, message)


@pytest.mark.parametrize("text", ["0-1,2", "0+1", "0-2"])
def test_sliding_layers_with_full_ones(text):
    refused(several("gemma3"), text, "layer 1 has sliding attention, and sliding and full layers never share")


def test_layers_that_already_share():
    of = tiny(
        "Gemma3nTextConfig",
        head_dim=16,
        num_kv_shared_layers=2,
        layer_types=["full_attention"] * 4,
        intermediate_size=[96] * 4,
        activation_sparsity_pattern=[0.0] * 4,
        vocab_size_per_layer_input=96,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
    )
    refused(of, "0-1,2-3", "its layers already share keys and values")


def test_layers_of_which_some_do_not_rotate():
    of = tiny("SmolLM3Config", no_rope_layers=[1, 0, 1, 1], use_sliding_window=False)
    refused(of, "0-1,2-3", "layer 1 makes other keys of what layer 0 projects .*different groups")
    with shared(of, SharingMap.parse("0,1,2-3")):
        of(random_ids(9))


def test_projections_that_are_no_plain_linear_layers():
    class Adapted(nn.Linear):
        """As adapters and quantised layers are."""

    of = several("llama")
    adapted = Adapted(64, 32, bias=False)
    of.model.layers[1].self_attn.v_proj = adapted
    refused(of, "0-1,2", "layer 1: v_proj is a Adapted, only plain linear layers can be shared: merge adapters")


def test_projections_under_other_names():
    of = several("llama")
    attention = of.model.layers[1].self_attn
    attention.add_module("qkv_proj", nn.Linear(4, 4))
    refused(of, "0-1,2", "LlamaAttention .layer 1.: no projections known by name to share, it has q_proj, k_proj")


def test_projections_of_other_shapes():
    of = several("qwen2")
    of.model.layers[1].self_attn.k_proj.bias = None
    refused(of, "0-1,2", "layers 0 and 1 have projections of different shapes or biases")


def checkpointing(of, on):
    for module in of.modules():  # as transformers does, whose method has another name in each version
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = on


@pytest.mark.parametrize("text", ["0,1-2", "0-1,2"])
@pytest.mark.parametrize("projection", ["k_proj", "v_proj"])
def test_projections_tied_to_those_of_a_layer_outside_the_group(text, projection):
    of = several("llama")
    first, second, third = (layer.self_attn for layer in of.model.layers)
    outside, inside = (first, second) if text == "0,1-2" else (third, first)
    getattr(inside, projection).weight = getattr(outside, projection).weight
    refused(of, text, rf"layers\.\d\.self_attn\.{projection}\.weight are tied: .*untie them first")


def test_tied_projections_within_a_group_share():
    of = several("llama")
    first, second, third = (layer.self_attn for layer in of.model.layers)
    second.k_proj.weight, third.q_proj.weight = first.k_proj.weight, first.q_proj.weight
    with shared(of, SharingMap.parse("0-1,2")):
        of(random_ids(9))
    refused(of, "0,1-2", "k_proj.weight are tied")
    second.k_proj.weight = nn.Parameter(first.k_proj.weight.detach().clone())
    with shared(of, SharingMap.parse("0,1-2")):
        of(random_ids(9))
    refused(of, "0,1-2", "q_proj.weight are tied", trainable="shared")  # layer 0 would be trained, too


def test_gradient_checkpointing():
    of = several("llama")
    checkpointing(of, True)
    refused(of, "0-1,2", "gradient checkpointing computes a layer again when what its storing layer kept is gone")
    checkpointing(of, False)
    with shared(of, SharingMap.parse("0-1,2"), trainable="all"):
        checkpointing(of.train(), True)
        with pytest.raises(KvcalError, match="gradient checkpointing"):
            of(random_ids(9))


def test_other_settings_and_a_second_sharing():
    of = several("llama")
    refused(of, "0-1,2", "pool 'median': give mean or first", pool="median")
    refused(of, "0-1,2", "trainable 'some': give none or shared or attention or all", trainable="some")
    refused(of, "0-1,2", "weights: the shared model has no parameter x", weights={"x": torch.zeros(1)})
    # A reading layer's own keys are gone.
    gone = {"model.layers.1.self_attn.k_proj.weight": torch.zeros(32, 64)}
    refused(of, "0-1,2", "weights: the shared model has no parameter model.layers.1", weights=gone)
    norm = {"model.norm.weight": torch.zeros(3)}
    refused(of, "0-1,2", r"weights: model.norm.weight has shape \[3\], this model needs \[64\]", weights=norm)
    with shared(of, SharingMap.parse("0-1,2")):
        refused(of, "0,1,2", r"share keys and values already \(0-1,2\)")
        with pytest.raises(KvcalError, match="take the method after the"), compress(of, None, "cla", groups="0-1,2"):
            pass


def test_a_reading_layer_by_itself():
    of = several("llama")
    with (
        shared(of, SharingMap.parse("0-1,2")),
        pytest.raises(KvcalError, match=r"reads model\.layers\.0\.self_attn\.k_proj was called by itself"),
    ):
        of.model.layers[1].self_attn.k_proj(torch.zeros(1, 1, 64))


@pytest.mark.parametrize("method", ["streaming", "h2o", "subgen"])
def test_methods_that_forget(method):
    of = model()
    before = inventory(of)
    settings = {**small(method), "method": f"cla+{method}"}
    with (
        pytest.raises(KvcalError, match=f"layers 0, 1 share keys and values, and {method} evicts tokens"),
        compress(of, None, **settings, groups="0-1,2"),
    ):
        pass
    assert inventory(of) == before


def test_a_cache_of_another_sharing():
    of, groups = model(), SharingMap.parse("0-1,2")
    plain = CompressedCache(of, None, "full")
    step_logits(of, random_ids(9), plain, 6)
    with shared(of, groups):
        cache = CompressedCache(of, None, "full")
        expected = step_logits(of, random_ids(9), cache, 6)
        with pytest.raises(KvcalError, match="made when layers shared keys and values in none, now they share in"):
            of(random_ids(1), past_key_values=plain)
        with pytest.raises(KvcalError, match="other layers share"):
            cache.adopt(plain)
    for text, pool, message in (
        (None, None, "in groups 0-1,2, now they share in none"),
        ("0-2", "mean", "in groups 0-1,2, now they share in groups 0-2"),
        ("0-1,2", "first", "in groups 0-1,2, now they share in groups 0-1,2, with other weights"),
    ):
        sharing = share(of, SharingMap.parse(text), pool=pool) if text else None
        with pytest.raises(KvcalError, match=message) as caught:
            of(random_ids(1), past_key_values=cache)
        assert "\n" not in str(caught.value)
        if sharing:
            sharing.remove()
    with shared(of, groups), torch.no_grad():  # under the same it goes on
        found = of(random_ids(1), past_key_values=cache).logits
        again = CompressedCache(of, None, "full")
        step_logits(of, random_ids(9), again, 6)
        torch.testing.assert_close(found, of(random_ids(1), past_key_values=again).logits, **CLOSE)
    assert expected.shape[1] == 4


def test_cla_is_no_method_of_a_cache_and_none_by_layer():
    of = model()
    message = r"cla\+loki changes the model, all of its layers: compress\(model, artifact, method='cla\+loki'\)"
    with pytest.raises(KvcalError, match=message):
        CompressedCache(of, None, "cla+loki")
    for method in ({"0": "cla", "1-": "full"}, ["cla", "full", "full"]):
        with pytest.raises(KvcalError, match="cla changes the model"), compress(of, None, method):
            pass
    for method in ("cla+nothing", "cla+", "clamp"):
        with pytest.raises(KvcalError, match="unknown method"), compress(of, None, method, groups="0-1,2"):
            pass
