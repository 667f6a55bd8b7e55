"""What is refused of an engine, by stand-ins for vLLM's configuration; and how large its pages are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compressed import artifact
from methods import CASES
from sequences import Geometry, make

from kvcal.artifacts import KvcalError
from kvcal.runtime.engines.vllm.checks import check_engine, check_version, full_layers
from kvcal.runtime.engines.vllm.config import Asked, asked_of, bytes_per_token
from kvcal.runtime.kv.engine_pages import layout_of
from kvcal.runtime.methods.base import Policy


def configured(**changes: Any) -> SimpleNamespace:
    """A configuration of vLLM, with other values by the path of their names."""
    text = SimpleNamespace(num_hidden_layers=3, layer_types=None, sliding_window=None)
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            model="org/model", use_mla=False, runner_type="generate", is_encoder_decoder=False, dtype=torch.bfloat16,
            is_mm_prefix_lm=False, rswa_window=None, hf_config=text, hf_text_config=text,
            get_total_num_kv_heads=lambda: 2, get_head_size=lambda: 64,
        ),
        cache_config=SimpleNamespace(
            cache_dtype="auto", user_specified_block_size=False, block_size=16, kv_sharing_fast_prefill=False
        ),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1),
        speculative_config=None,
    )  # fmt: skip
    for path, value in changes.items():
        *names, last = path.split("__")
        holder = config
        for name in names:
            holder = getattr(holder, name)
        setattr(holder, last, value)
    return config


def test_methods_by_layer():
    layers = ["full_attention", "sliding_attention", "full_attention"]
    asked = Asked({"method": {"0-1": "full", "2": {"method": "quest", "keep": 9}}})
    found = check_engine(asked, configured(model_config__hf_text_config__layer_types=layers), "cpu")
    assert {layer: type(method).__name__ for layer, method in found.items()} == {0: "Full", 2: "Quest"}
    assert found[2].keep == 9


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_config__use_mla": True}, r"org/model: its attention is latent \(MLA\)"),
        ({"model_config__runner_type": "pooling"}, "something else than a decoder"),
        ({"model_config__is_encoder_decoder": True}, "something else than a decoder"),
        ({"model_config__is_mm_prefix_lm": True}, "attention in both directions within a prompt"),
        ({"model_config__rswa_window": 64}, "R-SWA"),
        ({"model_config__hf_text_config__num_kv_shared_layers": 2}, "layers that read other layers' keys"),
        ({"model_config__hf_text_config__sliding_window": 64}, "no layer sees all tokens"),
        ({"cache_config__cache_dtype": "fp8"}, "kv_cache_dtype fp8: .* leave it out"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill"),
        ({"cache_config__user_specified_block_size": True}, "block_size 16: give a multiple of 64"),
        ({"parallel_config__decode_context_parallel_size": 2}, "decode_context_parallel_size 2: .* give 1"),
        ({"speculative_config": SimpleNamespace(method="eagle")}, "by eagle: its draft model .* take ngram or suffix"),
    ],
)
def test_what_an_engine_cannot_do(changes, said):
    with pytest.raises(KvcalError, match=said) as caught:
        check_engine(Asked({"method": "full"}), configured(**changes), "cpu")
    assert "\n" not in str(caught.value)


def test_platforms_and_versions():
    with pytest.raises(KvcalError, match="vLLM runs on tpu: kvcal's backend has cpu and cuda"):
        check_engine(Asked({"method": "full"}), configured(), "tpu")
    check_version("0.32.4")
    for other in ("0.31.9", "0.33.0", "1.32.0", "dev"):
        with pytest.raises(KvcalError, match=f"vLLM {other} is installed, .* made for 0.32"):
            check_version(other)


def test_layers_of_full_attention():
    config = configured().model_config.hf_text_config
    assert full_layers(config) == [0, 1, 2]
    config.sliding_window, config.use_sliding_window = 32, False
    assert full_layers(config) == [0, 1, 2]
    config.layer_types = ["linear_attention", "full_attention", "sliding_attention"]
    assert full_layers(config) == [1]


def test_who_asks_for_nothing():
    assert all(
        asked_of(given) is None for given in ({}, {"other": 1, "gdn_prefill_backend": "x"}, None, {"kvcal": None})
    )
    with pytest.raises(KvcalError, match="give a mapping such as"):
        asked_of({"kvcal": ["spectral"]})
    for given in ({"kvcall": {}}, {"KVCAL": {}}, {"artifact": "folder", "method": "loki"}):
        with pytest.raises(KvcalError, match="and no 'kvcal': give it as"):
            asked_of(given)
    for name, meant in (("artefact", "artifact"), ("methd", "method")):
        with pytest.raises(KvcalError, match=f"'{name}': did you mean '{meant}'"):
            asked_of({"kvcal": {name: "x"}})


def test_an_artifact_of_other_heads():
    asked = Asked({"method": "loki"})
    asked.artifact = artifact()
    (method,) = asked.methods([0], 1).values()
    heads, _, dims = artifact().tensor("pca", 0, "key_post.components").shape
    with pytest.raises(KvcalError, match=f"loki, layer 0: the artifact has {heads} KV heads, this model {heads + 1}"):
        asked.policy(method, 0, dims, heads + 1)


def test_pages_have_room_for_the_largest_layer_and_whole_rows_of_all():
    geometry = Geometry(64, 64, 2, 1)
    policies = [
        make(name, geometry, **settings).policy
        for name in ("full", "quest", "sparq", "loki", "spectral")
        for settings in CASES[name].forms.values()
        if name != "spectral" or settings.get("rows") != 8
    ]
    layouts = [layout_of(policy, 2, 64, 64, torch.float32) for policy in policies]
    found = 64 * bytes_per_token(policies, 2, 64, torch.float32)
    assert all(found >= layout.nbytes and found % layout.unit == 0 for layout in layouts)


def test_ranks_of_their_own_do_not_swell_pages():
    """The least common multiple of fourteen layers' rows is 18 TB."""
    geometry = Geometry(64, 64, 2, 1)
    policies: list[Policy] = [
        make("loki", geometry, basis="score", rank=rank).policy for rank in (9, 11, 13, 17, 19, 23, 25, 27, 29, 31)
    ]
    found = bytes_per_token(policies, 2, 64, torch.float32)
    most = max(layout_of(policy, 2, 64, 64, torch.float32).nbytes for policy in policies)
    assert most <= 64 * found <= most * 17 / 16 + 256
