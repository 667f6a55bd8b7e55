"""Architectures that calibrated and then failed late: they decode as plain `generate()`, or nothing of them is run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from kvcal.artifacts import KvcalError
from kvcal.calibrate import calibrate
from kvcal.calibrate.blocks import TokenBlocks
from kvcal.calibrate.capture import check_capture
from kvcal.calibrate.models import max_context
from kvcal.runtime import compress, decode
from kvcal.runtime.integration.routing import backbone
from kvcal.runtime.integration.support import find_attention

IDS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[0] * 3 + [1] * 9, [1] * 12])
"""The first row begins with three tokens of padding."""
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 2,
}
BART = {
    "vocab_size": 96,
    "d_model": 32,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 32,
    "is_decoder": True,
    "is_encoder_decoder": False,
    "max_position_embeddings": 64,
    "forced_eos_token_id": None,
}


def build(config: str, settings: dict, scale: float = 0.2):
    made = getattr(transformers, config)(**settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(made).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, scale) if parameter.dim() == 2 else None
    return model


def blocks(tokens: int = 8) -> TokenBlocks:
    every = torch.ones(1, tokens, dtype=torch.bool)
    return TokenBlocks(IDS[:1, :tokens].int(), every, every, {"id": "random"})


REFUSED = {
    "latent": ("DeepseekV3Config", TINY | LATENT, "attends to other keys and values than it puts into its cache"),
    "repeated": ("JetMoeConfig", TINY | {"num_local_experts": 2, "kv_channels": 8}, "attends to other keys and values"),
    "two softmaxes": ("DiffLlamaConfig", TINY, r"calls its attention 2 times a pass"),
    "mask of its own": ("DogeConfig", TINY, "hides more or less than the future"),
    "indexed": (
        "DeepseekV32Config",
        TINY | LATENT | {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4},
        r"layers \[0, 1\] keep other state than keys and values \(DynamicIndexedLayer\)",
    ),
    "state beside keys": (
        "FalconH1Config",
        TINY | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
        "keep other state than keys and values",
    ),
    "recurrent": ("MambaConfig", {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2}, "keep other state"),
    "not causal": ("BertConfig", TINY | {"is_decoder": False}, "sees the future"),
    "no attention": (
        "XLNetConfig",
        {"vocab_size": 96, "d_model": 32, "n_layer": 2, "n_head": 4},
        "attention interface",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_every_road_before_anything_runs(name):
    config, settings, said = REFUSED[name]
    model = build(config, settings)
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    roads = {
        "calibrate": lambda: calibrate(model, blocks(), reservoir=2, progress=lambda *_: passes.append(1)),
        "compress": lambda: compress(model, None, "full").__enter__(),
        "decode": lambda: decode(model, IDS, None, "full", max_new_tokens=2),
    }
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for road in roads.values():
        with pytest.raises(
            KvcalError,
            match=rf"^{type(model).__name__} \(model type .*{said}.*not supported [(]docs/architectures.md .*$",
        ):
            road()
    assert not passes
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


WORK = {
    "attention mask by name": (
        "AfmoeConfig",
        TINY | WINDOWED | {"head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1},
    ),
    "decoder is its head": ("ModernBertDecoderConfig", TINY | {"cls_token_id": 1, "sep_token_id": 2}),
    "head sizes by layer": (
        "Gemma4TextConfig",
        TINY
        | WINDOWED
        | {"head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96},
    ),
    "values of another size": (
        "MiMoV2FlashConfig",
        TINY
        | {"head_dim": 8, "v_head_dim": 4, "layer_types": ["full_attention"] * 2}
        | {"n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32},
    ),
    "positions by its cache": ("BartConfig", BART),
}


@pytest.mark.parametrize("name", WORK)
def test_equals_generate(name):
    model = build(*WORK[name])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": [999], "pad_token_id": 0}
    with torch.no_grad():
        expected = model.generate(IDS, attention_mask=MASK, **options)
        artifact = calibrate(model, blocks(), reservoir=8)
        for method, settings in (("full", {}), ("loki", {"rank": 0.5, "keep": 1.0, "basis": "pca", "select": "head"})):
            with compress(model, artifact, method, **settings):
                assert torch.equal(model.generate(IDS, attention_mask=MASK, **options), expected)
        found = decode(model, IDS, None, "full", attention_mask=MASK, max_new_tokens=6, eos_token_id=[999])
    assert torch.equal(found.tokens, expected)
    if name == "positions by its cache":
        assert "numbers positions by the length of its cache" in found.why_not_captured


def test_what_decodes_and_cannot_be_calibrated_is_said_before_the_pass():
    settings = TINY | {
        "head_dim": 8,
        "num_local_experts": 2,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 32,
    }
    model = build("Llama4TextConfig", settings)
    with pytest.raises(KvcalError, match=r"Llama4TextAttention: its rotary embedding is not passed as \(cos, sin\)"):
        calibrate(model, blocks(), progress=lambda *_: pytest.fail("the pass began"))
    with torch.no_grad(), compress(model, None, "full"):
        model(IDS)


def test_watching_leaves_the_model_as_it_was():
    model = build("LlamaConfig", TINY).train()
    model.model.layers[0].eval()
    model.gradient_checkpointing_enable()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    found = find_attention(model)
    assert found == [layer.self_attn for layer in model.model.layers]
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config._attn_implementation == "sdpa"


def test_a_replaced_attention_is_watched_again():
    model = build("LlamaConfig", TINY)
    find_attention(model)

    class Twice(type(model.model.layers[1].self_attn)):
        def forward(self, *args, **kwargs):
            super().forward(*args, **{**kwargs, "past_key_values": None})
            return super().forward(*args, **kwargs)

    model.model.layers[1].self_attn = Twice(model.config, 1)
    with pytest.raises(KvcalError, match=r"layer 1 \(Twice\) calls its attention 2 times a pass"):
        find_attention(model)


def test_a_model_that_fails_by_itself_is_refused_in_one_line():
    model = build("XmodConfig", TINY | {"is_decoder": True, "languages": ["en_XX"]})
    with pytest.raises(
        KvcalError, match=r"^XmodForCausalLM .*from token ids alone \(Input language unknown.*not supported"
    ):
        check_capture(model)


def test_a_context_that_is_no_length():
    assert max_context(SimpleNamespace(max_position_embeddings=-1)) is None
    assert max_context(SimpleNamespace(n_positions=64)) == 64


def test_the_decoder_is_no_output_projection():
    model = build(*WORK["decoder is its head"])
    assert isinstance(model.get_decoder(), nn.Linear)
    assert backbone(model) is model.model
