"""What does not fit is said before an engine starts, in one line."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvcal.artifacts import KvcalError
from kvcal.runtime.engines.vllm.cpu import CpuBackend


def configured(model, kvcal, **options):
    return EngineArgs(
        model=model["model"], enforce_eager=True, max_model_len=1024, additional_config={"kvcal": kvcal}, **options
    ).create_engine_config()


def refused(model, kvcal, **options):
    with pytest.raises(KvcalError) as caught:
        configured(model, kvcal, **options)
    said = str(caught.value)
    assert said.startswith("kvcal: ") and "\n" not in said
    return said


def test_artifacts(prepared, tmp_path):
    demo, smollm2 = prepared["demo"], prepared["smollm2"]
    assert "no such artifact folder" in refused(demo, {"artifact": str(tmp_path / "none"), "method": "loki"})
    assert "give a folder or a Hub id" in refused(demo, {"artifact": 7})
    assert "this model has" in refused(demo, {"artifact": smollm2["artifact"]})
    assert "needs an artifact" in refused(demo, {"method": "spectral"})
    assert "needs an artifact" in refused(demo, {}), "the method is loki where none is named"
    assert "give a mapping such as" in refused(demo, "spectral")
    assert "'artefact': did you mean 'artifact'?" in refused(demo, {"artefact": demo["artifact"]})
    assert "'methd': did you mean 'method'?" in refused(demo, {"methd": "full"})
    for other in ({"kvcall": {"method": "full"}}, {"KVCal": {"method": "full"}}, {"artifact": demo["artifact"]}):
        with pytest.raises(KvcalError, match=r"additional_config has '\w+', and no 'kvcal': give it as"):
            EngineArgs(
                model=demo["model"], enforce_eager=True, max_model_len=1024, additional_config=other
            ).create_engine_config()
    damaged = tmp_path / "damaged"
    shutil.copytree(demo["artifact"], damaged)
    manifest = json.loads((damaged / "manifest.json").read_text())
    manifest["schema"] = 99
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    assert "damaged" in refused(demo, {"artifact": str(damaged)})


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"method": "clusterkv"}, "its clusters are built over a whole sequence"),
        ({"method": "streaming"}, "it evicts tokens"),
        ({"method": "h2o"}, "it evicts tokens"),
        ({"method": "snapkv"}, "it evicts tokens"),
        ({"method": "subgen"}, "it evicts tokens"),
        ({"method": "exact_topk"}, "it reads every key"),
        ({"method": "spectral", "offload": "cpu"}, "leave offload out"),
        ({"method": "full", "record_mass": True}, "leave them out"),
        ({"method": "quest", "rank": 3}, "has no parameter 'rank'"),
        ({"method": "spectrall"}, "did you mean spectral"),
        ({"method": "quest", "page": 48}, "give 1, 2, 4, 8, 16, 32 or 64"),
        ({"method": "spectral", "keep": 2.0}, "a fraction is at most 1.0"),
    ],
)
def test_methods_and_settings(prepared, asked, why):
    demo = prepared["demo"]
    said = refused(demo, {"artifact": demo["artifact"], **asked})
    assert why in said
    if asked["method"] in ("clusterkv", "exact_topk", "subgen"):
        assert said.endswith("vLLM's pages take full, spectral, loki, quest, sparq")


def test_engines(prepared):
    demo = prepared["demo"]
    asked = {"artifact": demo["artifact"], "method": "spectral"}
    assert "block_size 16: give a multiple of 64" in refused(demo, asked, block_size=16)
    assert "kv_cache_dtype fp8" in refused(demo, asked, kv_cache_dtype="fp8")
    assert configured(demo, asked, block_size=128).additional_config["kvcal"] == asked


def test_another_version_of_vllm(prepared, monkeypatch):
    demo = prepared["demo"]
    monkeypatch.setattr("vllm.__version__", "0.33.1")
    said = refused(demo, {"artifact": demo["artifact"]})
    assert "vLLM 0.33.1 is installed, and this version of kvcal was made for 0.32" in said


def test_nothing_is_said_to_others(prepared, monkeypatch):
    """Of whatever version."""
    monkeypatch.setattr("vllm.__version__", "0.33.1")
    config = EngineArgs(model=prepared["demo"]["model"], enforce_eager=True, max_model_len=1024).create_engine_config()
    assert config.additional_config == {}


def test_nothing_changes_for_others(prepared):
    """The class that stands in for vLLM's says what that says."""
    config = EngineArgs(model=prepared["demo"]["model"], enforce_eager=True, max_model_len=1024).create_engine_config()
    spec = FullAttentionSpec(block_size=128, num_kv_heads=2, head_size=64, dtype=torch.float32)
    with set_current_vllm_config(config):
        impl = CpuBackend.get_impl_cls()(4, 64, 0.125, 2, None, None, "auto")
        assert impl.layer_of(SimpleNamespace(layer_name="model.layers.0.self_attn.attn")) is None
        assert CpuBackend.customize_spec(spec) == spec
        for name in ("get_supported_kernel_block_sizes", "supported_kv_cache_layouts", "get_name"):
            assert repr(getattr(CpuBackend, name)()) == repr(getattr(CPUAttentionBackend, name)())
