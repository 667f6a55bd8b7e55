"""A checkpoint's folder from a stranger: nothing outside of it is read, nothing is fetched, nonsense is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, LlamaConfig, modeling_utils

from kvcal.artifacts import KvcalError
from kvcal.runtime.integration.checkpoint_folder import check_folder
from kvcal.runtime.integration.checkpoint_json import harmless

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "secret.safetensors").write_bytes(b"theirs")
    (tmp_path / "model").mkdir()
    write(tmp_path / "model" / "config.json", {"model_type": "llama", **SIZES})
    return tmp_path / "model"


def write(path: Path, body: Any) -> None:
    path.write_text(json.dumps(body))


@pytest.mark.parametrize("value", [-3, 0, 1 << 40, "4", 2.0, True, [2, -1], [2, "x"]], ids=str)
@pytest.mark.parametrize("name", ["num_hidden_layers", "num_key_value_heads", "head_dim", "vocab_size", "hidden_size"])
def test_sizes_of_no_model(folder: Path, name: str, value: Any) -> None:
    for body in ({name: value}, {"text_config": {name: value}}):
        write(folder / "config.json", {"model_type": "llama", **body})
        with pytest.raises(KvcalError, match=f"config.json: {name} is .*: expected a whole number from"):
            check_folder(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {"transformers_weights": "../secret.safetensors"},
        {"transformers_weights": "/etc/passwd"},
        {"configuration_files": ["config.4.0.0.json"]},
        {"backbone": "org/name"},
        {"use_pretrained_backbone": True},
        {"vision_config": {"architecture": "hf-hub:org/name"}},
        {"tokenizer_class": "AutoTokenizer"},
        {"tokenizer_class": "AutoModelForCausalLM"},
        {"tokenizer_class": ["LlamaTokenizer"]},
        {"dtype": "load"},
    ],
    ids=str,
)
def test_a_config_that_leads_elsewhere(folder: Path, entry: dict[str, Any]) -> None:
    write(folder / "config.json", {"model_type": "llama", **entry})
    name = next(iter(entry.get("vision_config", entry)))
    with pytest.raises(KvcalError, match=f"config.json: {name} is"):
        check_folder(folder)


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "a/../../secret.safetensors", "{outside}/x", "", ".", "a\nb", "x" * 300, 3, None, ["x"]],
    ids=str,
)
def test_a_shard_outside_of_the_folder(folder: Path, index: str, name: Any) -> None:
    name = name.format(outside=folder.parent) if isinstance(name, str) else name
    write(folder / index, {"weight_map": {"a": "model-1.safetensors", "b": name}})
    with pytest.raises(KvcalError, match=f"{index}: .*expected a file"):
        check_folder(folder)


@pytest.mark.parametrize("name", ["model-1.safetensors", "model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_out_of_the_folder(folder: Path, name: str) -> None:
    if name == "model-1.safetensors":
        write(folder / "model.safetensors.index.json", {"weight_map": {"a": name}})
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../secret.safetensors")
    with pytest.raises(KvcalError, match=f"{name} is a link out of this folder"):
        check_folder(folder)


def test_links_of_a_hub_cache_are_its_own(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "blobs").mkdir()
    write(snapshot.parent.parent / "blobs" / "1", {"model_type": "llama", **SIZES})
    (snapshot / "config.json").symlink_to("../../blobs/1")
    check_folder(snapshot)


@pytest.mark.parametrize(
    "entry",
    [
        {"tokenizer_file": "{outside}/secret.safetensors"},
        {"sp_model_kwargs": {"model_file": "{outside}/secret.safetensors"}},
        {"init_inputs": ["x"]},
        {"chat_template": [{"name": "../../evil", "template": "x"}]},
        {"chat_template": {"/evil": "x"}},
        {"tokenizer_class": "AutoTokenizer"},
    ],
    ids=str,
)
def test_a_tokenizer_that_leads_elsewhere(folder: Path, entry: dict[str, Any]) -> None:
    text = json.dumps(entry).replace("{outside}", str(folder.parent))
    (folder / "tokenizer_config.json").write_text(text)
    with pytest.raises(KvcalError, match=r"tokenizer_config\.json: "):
        check_folder(folder)


def test_what_published_checkpoints_have_is_taken(folder: Path) -> None:
    """Names of files on the machine that a tokenizer was made on, code for those who trust it, layers of many kinds."""
    config = {"auto_map": {"AutoConfig": "configuration_x.X"}, "torch_dtype": "bfloat16", "pad_token_id": -1}
    write(folder / "config.json", {**SIZES, **config, "num_key_value_heads": [2, 0, None], "backbone_config": {}})
    leftover = {"tokenizer_file": "/home/nobody/.cache/tokenizer.json", "chat_template": [{"name": "rag"}]}
    write(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizerFast", "init_inputs": [], **leftover})
    write(folder / "model.safetensors.index.json", {"weight_map": {"a": "model-00001-of-00002.safetensors"}})
    check_folder(folder)


def test_adapters_and_parts_of_distributed_checkpoints(folder: Path) -> None:
    write(folder / "adapter_config.json", {"base_model_name_or_path": "org/other"})
    with pytest.raises(KvcalError, match="has an adapter beside the model"):
        check_folder(folder)
    (folder / "adapter_config.json").unlink()
    (folder / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"")
    with pytest.raises(KvcalError, match="part of a distributed checkpoint"):
        check_folder(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 200 + "1" + "}" * 200, "[]", "\ud83d", "{"], ids=repr)
def test_json_that_is_none(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(KvcalError, match=r"config\.json: (cannot be loaded|more than)"):
        check_folder(folder)


KERNELS = ["org/name", "org/name@v1:fn", "flash_attention_2", "paged|sdpa", "flex_attention", "none", {"": "org/x"}, 3]


@pytest.mark.parametrize("asked", KERNELS, ids=str)
@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_no_kernel_is_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, asked: Any) -> None:
    def fetched(*_: Any, **__: Any) -> None:
        raise AssertionError("a kernel was asked for")

    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", fetched)
    write(folder / "config.json", {"model_type": "llama", **SIZES, name: asked, "auto_map": {"AutoModel": "x.Y"}})
    config = harmless(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    model = AutoModelForCausalLM.from_config(config)
    assert model.config._attn_implementation == "sdpa" and not hasattr(model.config, "auto_map")


def test_configs_inside_a_config_are_made_harmless_too_and_eager_stays() -> None:
    config = Gemma3Config(text_config=SIZES, attn_implementation={"": "sdpa", "text_config": "org/name"})
    config.vision_config._attn_implementation = "eager"
    assert config.text_config._attn_implementation == "org/name"
    harmless(config)
    found = [each._attn_implementation for each in (config, config.text_config, config.vision_config)]
    assert found == ["sdpa", None, "eager"]
    assert harmless(LlamaConfig(attn_implementation="eager"))._attn_implementation == "eager"
