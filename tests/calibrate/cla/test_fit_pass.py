"""The pass that projections are fitted on, and what a fitted model computes, on tiny models of several kinds."""

import dataclasses

import architectures
import pytest
import torch
from architectures import ARCHITECTURES, Architecture, build
from cla_oracle import inventory
from cla_samples import blocks

from kvcal.artifacts import KvcalError
from kvcal.calibrate.cla import fit_pass, fitting
from kvcal.calibrate.cla.fit_pass import attention_received, fit_projections
from kvcal.calibrate.cla.fitting import fit_group
from kvcal.runtime.cla import SharingMap, shared

GROUPS = SharingMap.parse("0-1,2")
FITTED = {
    "llama": {},
    "llama-yarn": {},
    "mixtral": {},
    "qwen2": {},
    "llama-bias": {"attention_bias": True},
    "stablelm": {"partial_rotary_factor": 0.5},
}
NOT_FITTED = {
    "qwen3": "k_norm",
    "olmo2": "k_norm",
    "phi3": "qkv_proj",
    "gpt2": "c_attn",
    "cohere": "rotary embedding",
    "bitnet": "attn_sub_norm",
    "olmo": "not what .*_proj gives",
}
"""The last has its projections clipped."""
MORE = {
    "stablelm": Architecture("StableLmConfig"),
    "bitnet": Architecture("BitNetConfig"),
    "olmo": Architecture("OlmoConfig", {"clip_qkv": 0.05}),
}
"""Of no use to other tests: half of a head's dimensions rotate, a norm after attention, clipped projections."""
TEXT = blocks(count=6, length=21)


def of_kind(name, monkeypatch):
    monkeypatch.setattr(architectures, "ARCHITECTURES", {**ARCHITECTURES, **MORE})
    return build(name.removesuffix("-bias"), **FITTED[name])


def logits(model, **sharing):
    """[tokens of the text, vocabulary]."""
    given = {"input_ids": TEXT.ids.long(), "attention_mask": TEXT.attended.long(), "use_cache": False}
    with torch.no_grad():
        if not sharing:
            return model(**given).logits[TEXT.attended]
        with shared(model, GROUPS, **sharing):
            return model(**given).logits[TEXT.attended]


def make_alike(model):
    """Let layer 0 add nothing, so that layer 1 is fed the same, and its keys and values be what its own queries and
    outputs can absorb of layer 0's: two heads' values mixed within themselves, key planes turned and stretched."""
    first, second = model.model.layers[:2]
    mlp = first.mlp
    down = [mlp.down_proj.weight] if hasattr(mlp, "down_proj") else [mlp.experts.down_proj]
    attention, other = first.self_attn, second.self_attn
    half = model.model.rotary_emb(torch.zeros(1), torch.zeros(1, 1, dtype=torch.int64))[0].shape[-1] // 2
    factor = torch.polar(torch.tensor([0.5, 2.0]), torch.tensor([1.0, 4.0]))
    mix = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for weight in (*attention.o_proj.parameters(), *down):
            weight.zero_()
        second.input_layernorm.load_state_dict(first.input_layernorm.state_dict())
        for name, source in attention.k_proj.named_parameters():
            heads = source.unflatten(0, (2, 16)).clone()
            planes = torch.complex(heads[:, :half], heads[:, half : 2 * half])
            planes = planes * factor.view(2, *[1] * (planes.dim() - 1))
            heads[:, :half], heads[:, half : 2 * half] = planes.real, planes.imag
            getattr(other.k_proj, name).copy_(heads.flatten(0, 1))
        for name, source in attention.v_proj.named_parameters():
            mixed = torch.einsum("hcd,hd...->hc...", mix, source.unflatten(0, (2, 16)))
            getattr(other.v_proj, name).copy_(mixed.flatten(0, 1))


@pytest.mark.parametrize("name", FITTED)
def test_layers_that_can_share_without_loss_are_fitted_without_loss(name, monkeypatch):
    monkeypatch.setattr(fitting, "_RIDGE", 1e-6)  # with it the reading layers' inputs are a little less than predicted
    model = of_kind(name, monkeypatch)
    make_alike(model)
    own = logits(model)
    found = logits(model, weights=fit_projections(model, GROUPS, TEXT, batch_size=4))
    scale = float(own.abs().max())
    assert float((logits(model, pool="mean") - own).abs().max()) > 0.02 * scale
    torch.testing.assert_close(found, own, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_the_moments_are_weighted_by_the_attention_that_tokens_receive(name, monkeypatch):
    """By eager attention's own weights, and inputs and queries as hooks on the projections see them."""
    model = build(name, attention="eager")
    seen, queries = {}, {}
    for layer in (0, 1):
        attention = model.model.layers[layer].self_attn
        attention.k_proj.register_forward_hook(lambda m, args, out, layer=layer: seen.update({layer: args[0]}))
        attention.q_proj.register_forward_hook(lambda m, args, out, layer=layer: queries.update({layer: out}))
    with torch.no_grad():
        given = {"input_ids": TEXT.ids.long(), "attention_mask": TEXT.attended.long(), "use_cache": False}
        weights = model(**given, output_attentions=True).attentions
    kept = TEXT.attended
    received = sum((each * kept[:, None, :, None]).sum(2).mean(1) for each in weights[:2])
    biased = name == "qwen2"
    inputs = {layer: torch.cat((x, torch.ones_like(x[..., :1])), -1) if biased else x for layer, x in seen.items()}
    expected = {
        layer: torch.einsum("bti,btj,bt->ij", inputs[layer].double(), inputs[0].double(), received.double())
        for layer in (0, 1)
    }
    heads = {layer: out.unflatten(-1, (2, 2, 16))[kept].double() for layer, out in queries.items()}
    found = []
    monkeypatch.setattr(
        fit_pass, "fit_group", lambda weights, moments, dims: found.append(moments) or fit_group(weights, moments, dims)
    )
    fit_projections(model, GROUPS, TEXT, batch_size=4)
    for layer, moments in enumerate(found[0]):
        torch.testing.assert_close(moments.cross, expected[layer], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            moments.query, torch.einsum("nhgd,nhge->hde", heads[layer], heads[layer]), rtol=1e-4, atol=1e-4
        )


def test_attention_is_added_up_over_blocks_of_queries(monkeypatch):
    query, key = torch.randn(2, 4, 50, 8), torch.randn(2, 2, 50, 8)
    attended = torch.ones(2, 50, dtype=torch.bool)
    attended[1, 30:] = False
    whole = attention_received(query, key, attended, 0.5)
    monkeypatch.setattr(fit_pass, "_QUERIES", 7)
    torch.testing.assert_close(attention_received(query, key, attended, 0.5), whole)
    # Every query gives out one, and padding receives nothing.
    torch.testing.assert_close(whole.sum(1), torch.tensor([50.0, 30.0]))
    assert not whole[1, 30:].any()


def test_padding_is_not_fitted_on():
    model = build("llama")
    ids = TEXT.ids.clone()
    ids[~TEXT.attended] = 7
    first, second = (fit_projections(model, GROUPS, dataclasses.replace(TEXT, ids=each)) for each in (TEXT.ids, ids))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_model_is_left_as_it_was_found():
    model = build("llama")
    before = inventory(model)
    fit_projections(model, GROUPS, TEXT)
    assert inventory(model) == before


@pytest.mark.parametrize(("name", "why"), NOT_FITTED.items())
def test_architectures_that_are_not_fitted_are_refused_by_what_they_have(name, why, monkeypatch):
    monkeypatch.setattr(architectures, "ARCHITECTURES", {**ARCHITECTURES, **MORE})
    with pytest.raises(KvcalError, match=why) as caught:
        fit_projections(build(name), GROUPS, TEXT)
    assert "--pool mean" in str(caught.value) and "\n" not in str(caught.value)


def test_nan_is_named():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[0] = float("nan")
    with pytest.raises(KvcalError, match="layer 0: NaN or Inf in its attention"):
        fit_projections(model, GROUPS, TEXT)


def test_scores_beyond_float16_are_no_reason_to_refuse():
    model = build("llama", dtype=torch.float16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 2000
            layer.self_attn.k_proj.weight *= 2000
    assert all(torch.isfinite(tensor).all() for tensor in fit_projections(model, GROUPS, TEXT).values())


def test_models_in_wrappers_and_maps_of_other_models():
    model = build("llama")
    wrapped = fit_projections(torch.compile(model), GROUPS, TEXT)
    assert wrapped.keys() == fit_projections(model, GROUPS, TEXT).keys()
    with pytest.raises(KvcalError, match="this model has layers 0 to 2"):
        fit_projections(model, SharingMap.parse("0-1,2-9"), TEXT)
    with pytest.raises(KvcalError, match="sliding"):
        fit_projections(build("gemma2"), SharingMap.parse("0-1,2"), TEXT)
