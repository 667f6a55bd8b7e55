from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from transformers import LlamaConfig, LlamaForCausalLM

from kvcal.artifacts import KvcalError
from kvcal.artifacts.artifact import ModelIdentity
from kvcal.calibrate import builtin, models
from kvcal.calibrate.models import (
    MODEL_ALIASES,
    aliases,
    check_seq_len,
    default_seq_len,
    load_model,
    max_context,
    resolve_model,
    spec_of,
)
from kvcal.runtime import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def empty_offline_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


def _into_cache(cache: Path, repo_id: str, source: Path) -> Path:
    """Lay a checkpoint out as the Hub client does: blobs, and links to them in a snapshot."""
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for index, path in enumerate(sorted(source.iterdir())):
        shutil.copy(path, repository / "blobs" / f"{index:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{index:040x}")
    return snapshot


def test_load_from_folder(tiny_model_folder: Path, capfd: Any) -> None:
    loaded = load_model(tiny_model_folder)
    assert loaded.source == models.ModelSource(str(tiny_model_folder), tiny_model_folder, None)
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.model.device.type == "cpu" or torch.cuda.is_available()
    assert loaded.tokenizer("x")["input_ids"][0] == 256
    from safetensors.torch import load_file

    stored = load_file(tiny_model_folder / "model.safetensors")
    parameters = dict(loaded.model.named_parameters())
    assert set(stored) == set(parameters)
    assert all(torch.equal(stored[name], parameters[name].cpu()) for name in stored)
    assert capfd.readouterr() == ("", "")


def test_noise_settings_are_restored(tiny_model_folder: Path) -> None:
    from transformers.utils import logging

    logging.set_verbosity_warning()
    load_model(tiny_model_folder, device="cpu")
    assert logging.get_verbosity() == logging.WARNING and logging.is_progress_bar_enabled()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_dtype_on_cpu(tiny_model_folder: Path, tmp_path: Path, stored: torch.dtype) -> None:
    place = shutil.copytree(tiny_model_folder, tmp_path / "cast")
    load_model(tiny_model_folder, device="cpu").model.to(stored).save_pretrained(place)
    assert load_model(place, device="cpu").model.dtype == torch.float32
    for name, dtype in [("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)]:
        assert load_model(place, device="cpu", dtype=name).model.dtype == dtype


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may keep them packed")
def test_fp8_weights_are_unpacked_on_a_cpu(folder: Path) -> None:
    """Blocks of 32 x 32 8-bit floats with a scale each."""
    from safetensors.torch import load_file, save_file

    stored, expected = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        stored[name] = weight
        if name.endswith(("mlp.up_proj.weight", "q_proj.weight")):
            blocks = weight.unflatten(0, (-1, 32)).unflatten(2, (-1, 32))
            scale = blocks.abs().amax((1, 3), keepdim=True) / 448
            packed = (blocks / scale).to(torch.float8_e4m3fn)
            stored[name] = packed.reshape(weight.shape)
            stored[f"{name}_scale_inv"] = scale[:, 0, :, 0].contiguous()
            expected[name] = (packed.float() * scale).reshape(weight.shape)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    others = ["k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "lm_head"]
    quantised = {"quant_method": "fp8", "weight_block_size": [32, 32], "modules_to_not_convert": others}
    _config(quantization_config=quantised)(folder)
    loaded = load_model(folder, device="cpu")
    assert loaded.model.dtype == torch.float32 and not loaded.exact and len(expected) == 4
    weights = loaded.model.state_dict()
    assert all(torch.allclose(weights[name], value, atol=1e-6) for name, value in expected.items())


def test_load_from_cache(tiny_model_folder: Path, empty_offline_cache: Path) -> None:
    snapshot = _into_cache(empty_offline_cache, "mistralai/Mistral-7B-v0.1", tiny_model_folder)
    expected = models.ModelSource("mistralai/Mistral-7B-v0.1", snapshot, COMMIT)
    assert resolve_model("mistral-7b") == expected
    assert resolve_model("mistralai/Mistral-7B-v0.1") == expected
    assert resolve_model(f"mistral-7b@{COMMIT}") == expected
    assert resolve_model(spec_of(ModelIdentity(expected.id, COMMIT, {}, "0" * 64))) == expected
    assert load_model("mistral-7b", device="cpu").source == expected
    with pytest.raises(KvcalError, match=r"Mistral-7B-v0\.1@v9.*hf download"):
        resolve_model("mistral-7b@v9")


def test_incomplete_cache(tiny_model_folder: Path, empty_offline_cache: Path) -> None:
    snapshot = _into_cache(empty_offline_cache, "org/name", tiny_model_folder)
    (snapshot / "model.safetensors").resolve().unlink()
    with pytest.raises(KvcalError, match=r"only without weights \(model\.safetensors\) in the Hub cache"):
        resolve_model("org/name")


def test_online_loads_by_id_and_commit(monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path) -> None:
    monkeypatch.setattr(hub, "locate", lambda *_: hub.Located(None, COMMIT))
    monkeypatch.setattr(hub, "fetch", lambda *_: tiny_model_folder)
    seen = {}

    def from_pretrained(place: str, **options: Any) -> Any:
        seen[place] = options
        raise OSError("stop here")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", from_pretrained)
    with pytest.raises(KvcalError, match="stop here"):
        load_model("qwen3-8b")
    assert seen == {"Qwen/Qwen3-8B": {"trust_remote_code": False, "revision": COMMIT}}


def test_online_without_a_tokenizer(
    tiny_model_folder: Path, empty_offline_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = _into_cache(empty_offline_cache, "org/name", tiny_model_folder)
    (snapshot / "tokenizer.json").unlink()
    monkeypatch.setattr(hub, "locate", lambda *_: hub.Located(None, COMMIT))
    monkeypatch.setattr(hub, "fetch", lambda *_: snapshot)
    config = LlamaConfig.from_pretrained(tiny_model_folder)
    for name, found in (("AutoConfig", config), ("AutoTokenizer", None)):
        monkeypatch.setattr(f"transformers.{name}.from_pretrained", lambda *_, found=found, **__: found)
    with pytest.raises(KvcalError, match="the repository has no tokenizer"):
        load_model("org/name")


def test_alias_and_folder_of_the_same_name(
    tiny_model_folder: Path, tmp_path: Path, empty_offline_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = _into_cache(empty_offline_cache, "EleutherAI/pythia-1b", tiny_model_folder)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mistral-7b").write_text("a file")
    with pytest.raises(KvcalError, match="mistralai/Mistral-7B"):
        resolve_model("mistral-7b")
    (tmp_path / "pythia-1b").mkdir()
    assert resolve_model("pythia-1b").folder == snapshot, "an unrelated folder is in nobody's way"
    shutil.copytree(tiny_model_folder, tmp_path / "pythia-1b", dirs_exist_ok=True)
    assert resolve_model("pythia-1b") == models.ModelSource("pythia-1b", Path("pythia-1b"), None)


def test_demo_is_a_folder_of_the_package(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Path(MODEL_ALIASES["demo"]) == Path(builtin.__file__).parent / "demo_model"
    for path in tiny_model_folder.iterdir():  # as some installers do
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.setattr(aliases, "DEMO_FOLDER", tmp_path)
    assert load_model("demo", device="cpu").source == models.ModelSource("demo", tmp_path, None)


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(KvcalError, match="unknown model 'mistral-7': did you mean mistral-7b") as caught:
        resolve_model("mistral-7")
    assert all(alias in str(caught.value) for alias in MODEL_ALIASES)
    for absent in (tmp_path / "absent", "absent.gguf", "absent/model.Q4_K_M.gguf"):
        with pytest.raises(KvcalError, match="does not exist"):
            resolve_model(absent)
    with pytest.raises(KvcalError, match="demo@x: the built-in model has no revisions: give demo"):
        resolve_model("demo@x")
    with pytest.raises(
        KvcalError, match=r"model org/name does not exist here and is not in the Hub cache.*HF_HUB_OFFLINE"
    ):
        resolve_model("org/name")


def _without(*names: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return spoil


def _written(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def _config(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


def _cut(name: str) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 500)


def _cut_pickle(folder: Path) -> None:
    torch.save({"x": torch.zeros(1000)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    _cut("pytorch_model.bin")(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without("config.json"), "has no config.json"),
        (_without("model.safetensors"), r"has no weights \(model.safetensors\)"),
        (_without("tokenizer.json"), "has no tokenizer"),
        (_written("config.json", b"{oops"), "config.json: cannot be loaded"),
        (_written("config.json", b"[1]"), "config.json: cannot be loaded"),
        (_config(model_type="no_such_type"), "config.json cannot be loaded.*no_such_type"),
        (_config(hidden_size="many"), "config.json: hidden_size is 'many': expected a whole number from 1"),
        (_config(num_hidden_layers=-3), "config.json: num_hidden_layers is '-3': expected a whole number from 1"),
        (_config(num_hidden_layers=1 << 40), "config.json: num_hidden_layers is"),
        (_config(layer_types=["full_attention"] * 3), "config.json cannot be loaded.*layer_types"),
        (_config(num_attention_heads=4, num_key_value_heads=3), "4 attention heads cannot share 3 KV heads"),
        (_config(vocab_size=1 << 24), "config.json describes a model of .* weights, the files have [0-9]+ bytes"),
        (_config(hidden_act="none"), "weights cannot be loaded"),
        (_config(rope_parameters={"rope_type": "none"}), "cannot be loaded"),
        (_config(rope_parameters={"rope_type": "yarn", "rope_theta": 1.0}), "cannot be loaded"),
        (_config(hidden_size=36), r"weights cannot be loaded.*shapes differ from config.json"),
        (_config(num_hidden_layers=3), "9 weights are not in its files, e.g. model.layers.2"),
        (_config(model_type="no_such_type", auto_map={"AutoConfig": "evil.Config"}), "config.json cannot be loaded"),
        (_config(model_type="vit"), "weights cannot be loaded"),
        (_cut("model.safetensors"), "weights cannot be loaded.*incomplete"),
        (_written("model.safetensors", b""), "weights cannot be loaded"),
        (_written("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), "the files have 43 bytes"),
        (_cut_pickle, "weights cannot be loaded"),
        (_written("tokenizer.json", b"{oops"), "tokenizer cannot be loaded"),
        (_written("tokenizer.json", b'{"model": 3}'), "tokenizer cannot be loaded"),
        (_written("tokenizer.json", b'{"version": "1.0", "model": {"type": "none"}}'), "tokenizer cannot be loaded"),
    ],
)
def test_faulty_folders_give_one_line(folder: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(folder)
    with pytest.raises(KvcalError, match=message) as caught:
        load_model(folder, device="cpu")
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_shards(folder: Path) -> None:
    load_model(folder, device="cpu").model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    load_model(folder, device="cpu")
    shards[1].unlink()
    with pytest.raises(KvcalError, match=f"has no weights {shards[1].name}"):
        load_model(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(KvcalError, match=r"model\.safetensors\.index\.json: weight_map: expected a file"):
        load_model(folder)


def test_bugs_keep_their_traceback(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", bug)
    with pytest.raises(RuntimeError, match="a bug"):
        load_model(tiny_model_folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "unknown device 'gpu': give auto, cpu, cuda or cuda:N"),
        ({"device": "mps"}, "unknown device"),
        ({"device": "cuda:x"}, "unknown device"),
        ({"device": "cuda:99"}, "this machine has [0-9]+ usable CUDA devices"),
        ({"dtype": "int8"}, "unknown dtype 'int8': give auto, float32, bfloat16, float16"),
        ({"dtype": ""}, "unknown dtype"),
    ],
)
def test_bad_settings_fail_before_the_model_is_looked_for(options: dict[str, str], message: str) -> None:
    with pytest.raises(KvcalError, match=message):
        load_model("org/absent", **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_asked_for_and_absent(tiny_model_folder: Path) -> None:
    with pytest.raises(KvcalError, match="device cuda: this machine has 0"):
        load_model(tiny_model_folder, device="cuda")
    assert load_model(tiny_model_folder, device="auto").model.device.type == "cpu"


def test_multi_modal_model(tmp_path: Path, tiny_tokenizer: Any) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"head_dim": 8, "intermediate_size": 32, "vocab_size": 300, "max_position_embeddings": 77}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14})
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "gemma")
    tiny_tokenizer.save_pretrained(tmp_path / "gemma")
    loaded = load_model(tmp_path / "gemma", device="cpu")
    assert type(loaded.model).__name__ == "Gemma3ForConditionalGeneration"
    assert max_context(loaded.model.config) == 77
    with torch.no_grad():
        assert loaded.model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 300)


def test_context() -> None:
    from transformers import GPT2Config

    assert max_context(LlamaConfig(max_position_embeddings=128)) == 128
    assert max_context(GPT2Config(n_positions=99)) == 99
    assert max_context(SimpleNamespace()) is None
    check_seq_len(128, LlamaConfig(max_position_embeddings=128))
    check_seq_len(10**9, SimpleNamespace())
    with pytest.raises(KvcalError, match="blocks of 129 tokens exceed this model's context of 128: give --seq-len 128"):
        check_seq_len(129, LlamaConfig(max_position_embeddings=128))


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("settings", "seq_len"),
    [
        ({"max_position_embeddings": 128}, 128),
        ({"max_position_embeddings": 131072}, 8192),
        # Beyond 32 tokens its keys are rotated otherwise.
        ({"rope_parameters": {**LONGROPE, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}}, 32),
    ],
)
def test_blocks_are_as_long_as_the_context_where_nothing_is_said(settings: dict[str, Any], seq_len: int) -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 8}
    assert default_seq_len(LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=8, **settings))) == seq_len


def test_blocks_of_a_model_that_states_no_context() -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=8))
    model.config.max_position_embeddings = -1  # as XLNet says
    assert max_context(model.config) is None and default_seq_len(model) == 8192
