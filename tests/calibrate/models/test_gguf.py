"""A model from a GGUF file is the model that was written into it; what would be another is refused by name."""

from __future__ import annotations

import os
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import gguf_files
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from gguf import GGMLQuantizationType as Kind

from kvcal.artifacts import KvcalError, load, weights_sha256
from kvcal.calibrate import load_model
from kvcal.calibrate.cli import cli
from kvcal.calibrate.models import converted, resolve_model
from kvcal.calibrate.models.gguf_checks import check_described

IDS = torch.arange(0, 24).unsqueeze(0) * 7 % 256


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVCAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model() -> Any:
    return gguf_files.tiny_llama()


@pytest.fixture(scope="module")
def file(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float32: copy it before changing it."""
    return gguf_files.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model)


def test_weights_logits_tokenizer_and_ends_are_those_that_were_written(file: Path, model: Any, cache: Path) -> None:
    done: list[tuple[Any, ...]] = []
    loaded = load_model(file, device="cpu", progress=lambda *now, **note: done.append(now))
    assert weights_sha256(loaded.model) == weights_sha256(model)
    assert torch.equal(loaded.model(IDS).logits, model(IDS).logits)
    tokens = gguf_files.TOKENS
    assert loaded.tokenizer("ab  ").input_ids == [tokens.index("a"), tokens.index("b"), gguf_files.TWO_SPACES]
    asked = loaded.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert asked == "user:hi" and loaded.tokenizer.eos_token == "</s>"
    assert loaded.model.generation_config.eos_token_id == gguf_files.EOS
    assert not hasattr(loaded.model.config, "quantization_config")
    assert loaded.source.id == str(file) and loaded.source.folder.is_relative_to(cache)
    tensors = len(gguf_files.tensors_of(model))
    assert [now[1] for now in done] == [tensors] * len(done) and done[0][0] == 0 and done[-1][0] == tensors


ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 128, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 16, "num_hidden_layers": 6}),
}
"""Tied, with biases, with norms of queries and keys, and with layers that see a window (all but the sixth)."""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_other_architectures(architecture: str, tmp_path: Path) -> None:
    import transformers

    name, changes = ARCHITECTURES[architecture]
    config = getattr(transformers, name)(**gguf_files.SIZES | changes)
    model = gguf_files.tiny(config)
    scores: Any = {"tokenizer.ggml.scores": [-float(number) for number in range(gguf_files.VOCAB)]}
    pieces = scores | {"tokenizer.ggml.model": "llama", "tokenizer.ggml.merges": None}  # as Gemma's are
    written = gguf_files.write(
        tmp_path / "a.gguf", model, architecture=architecture, metadata=pieces if architecture == "gemma3" else {}
    )
    loaded = load_model(written, device="cpu").model
    assert type(loaded) is type(model)
    assert torch.allclose(loaded(IDS).logits, model(IDS).logits, atol=1e-5)  # of Gemma's norms float32 rounds w + 1 - 1


@pytest.mark.parametrize(("kind", "dtype"), [(Kind.F16, torch.float16), (Kind.BF16, torch.bfloat16)])
def test_a_file_in_16_bits_is_the_checkpoint_in_them(kind: Kind, dtype: torch.dtype, tmp_path: Path) -> None:
    model = gguf_files.tiny_llama().to(dtype)
    loaded = load_model(gguf_files.write(tmp_path / "half.gguf", model, kind), device="cpu")
    assert loaded.model.dtype == torch.float32 and weights_sha256(loaded.model) == weights_sha256(model)
    stored = load_model(loaded.source.folder, device="cpu", dtype=str(dtype).removeprefix("torch."))
    assert loaded.model.config.dtype == torch.float32 and f'"{str(dtype)[6:]}"' in _config(loaded.source.folder)
    assert weights_sha256(stored.model) == weights_sha256(model), "nothing was rounded on the way"


def _config(folder: Path) -> str:
    return (folder / "config.json").read_text()


def test_quantised_weights_are_unpacked_exactly(model: Any, tmp_path: Path) -> None:
    """Q8_0: 32 numbers are a half-precision scale and 8-bit integers."""
    loaded = load_model(gguf_files.write(tmp_path / "q8.gguf", model, Kind.Q8_0), device="cpu")
    assert '"float32"' in _config(loaded.source.folder)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.v_proj.weight"):
        weight = model.state_dict()[name]
        blocks = weight.unflatten(1, (-1, 32))
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        expected = (blocks / scale).round() * scale.half().float()
        assert torch.equal(loaded.model.state_dict()[name], expected.flatten(1))


def test_rotary_scaling_of_llama_3(tmp_path: Path) -> None:
    """GGUF has the divisors of the frequencies only: long wavelengths by the factor, short by one, ramped between."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {"rope_theta": 500000.0, "original_max_position_embeddings": 8192, **scaling}
    model = gguf_files.tiny_llama(rope_parameters=rope, head_dim=64)
    wavelength = 2 * np.pi * 500000.0 ** (np.arange(0, 64, 2) / 64)
    ramp = (8192 / wavelength - 1) / (4 - 1)
    divisors = np.where(wavelength < 8192 / 4, 1.0, np.where(wavelength > 8192, 8.0, 1 / ((1 - ramp) / 8 + ramp)))
    name = "rope_freqs.weight"
    written = gguf_files.write(tmp_path / "a.gguf", model, tensors={name: divisors.astype(np.float32)})
    loaded = load_model(written, device="cpu").model
    assert loaded.config.rope_parameters == rope
    far = torch.arange(100).unsqueeze(0)
    assert torch.allclose(loaded(far).logits, model(far).logits, atol=1e-5)
    divisors[-1] = 9
    other = gguf_files.write(tmp_path / "b.gguf", model, tensors={name: divisors.astype(np.float32)})
    with pytest.raises(KvcalError, match=r"b\.gguf: rope_freqs.weight is no rotary scaling of Llama 3's kind"):
        load_model(other)


def test_digits_are_split_where_the_model_learned_them_so(model: Any, tmp_path: Path) -> None:
    """Two spaces before a number are one token then: GPT-2's pattern gives the number the second one."""
    for pre, expected in (("smollm", ["a", "ĠĠ", "7"]), ("gpt-2", ["a", "Ġ", "Ġ", "7"])):
        path = gguf_files.write(tmp_path / f"{pre}.gguf", model, metadata={"tokenizer.ggml.pre": pre})
        loaded = load_model(path, device="cpu")
        assert loaded.tokenizer.convert_ids_to_tokens(loaded.tokenizer("a  7").input_ids) == expected


def test_generation_ends_where_a_turn_does(model: Any, tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path / "chat.gguf", model, metadata={"tokenizer.ggml.eot_token_id": 5})
    assert load_model(path, device="cpu").model.generation_config.eos_token_id == [gguf_files.EOS, 5]


def test_any_rank_of_a_job_can_be_the_one_that_converts(
    model: Any, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers alone would write on rank 0 only, and another one may have come first."""
    mixin = pytest.importorskip("transformers.distributed.mixin")
    monkeypatch.setattr(mixin, "_is_torch_distributed_initialized", lambda: True)
    monkeypatch.setattr(mixin, "_get_torch_distributed_rank", lambda: 1)
    assert weights_sha256(load_model(file, device="cpu").model) == weights_sha256(model)


def test_a_folder_with_one(file: Path, model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    os.link(file, folder / "a.gguf")
    (folder / "mmproj-a.gguf").write_bytes(b"GGUF")
    (folder / "README.md").write_text("a model")
    found = resolve_model(folder)
    assert (found.id, found.gguf) == (str(folder), (folder / "a.gguf",))
    (folder / "tokenizer_config.json").write_text('{"chat_template": "of another model"}')
    (folder / "adapter_config.json").write_text("{}")
    loaded = load_model(folder, device="cpu")
    assert weights_sha256(loaded.model) == weights_sha256(model), "what lies beside the file is no part of it"
    assert loaded.tokenizer.chat_template == gguf_files.TEMPLATE
    os.link(file, folder / "b.gguf")
    with pytest.raises(KvcalError, match=r"has 2 GGUF files \(a.gguf, b.gguf\): give one of them"):
        resolve_model(folder)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(KvcalError, match=r"has no config\.json"):
        resolve_model(folder)


def test_recipes_name_files(file: Path, tmp_path: Path) -> None:
    """A run from a recipe, and from the recipe of what it made: the same bytes."""
    text = tmp_path / "notes.txt"
    text.write_text("the key of a value is the query of a head\n" * 40)
    recipe = {"recipe": 1, "model": str(file), "data": str(text), "output": str(tmp_path / "made")}
    path, again = tmp_path / "recipe.yaml", tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump({**recipe, "pca": {"num_tokens": 256, "seq_len": 64, "reservoir": 32}}))
    for command in (
        ["run", "--recipe", path],
        ["recipe", tmp_path / "made", "-o", again],
        ["run", "--recipe", again, "--output", tmp_path / "made-again"],
    ):
        result = CliRunner().invoke(cli, [str(argument) for argument in command])
        assert result.exit_code == 0, result.output
    assert load(tmp_path / "made").content_hash == load(tmp_path / "made-again").content_hash


def test_links(file: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.gguf").symlink_to(file)
    assert resolve_model(tmp_path / "mine.gguf").gguf == (file.resolve(),)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.gguf").symlink_to(file)
    with pytest.raises(KvcalError, match=r"a.gguf: cannot be read \(is a link"):
        resolve_model(tmp_path / "folder")


FILES = {
    "not-gguf": (b"GGML" + bytes(99), r"a\.gguf: is not a GGUF file \(begins with b'GGML', b'GGUF' is expected\)"),
    "empty": (b"", r"a\.gguf: is not a GGUF file \(is empty"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "is a pointer of Git LFS.*git lfs pull"),
    "magic-only": (b"GGUF", r"is not a whole GGUF file \(it ends in its header\)"),
    "big-endian": (b"GGUF\0\0\0\3" + bytes(16), "big-endian"),
    "version-1": (b"GGUF\1\0\0\0" + bytes(16), "version 1, 2 or 3 is expected"),
}


@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_whole_file_is_said(kind: str, tmp_path: Path, cache: Path) -> None:
    content, message = FILES[kind]
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(KvcalError, match=message):
        load_model(tmp_path / "a.gguf")
    assert not list(cache.glob("gguf/*"))


def test_names_and_places_that_cannot_be(file: Path, tmp_path: Path) -> None:
    part = tmp_path / "a-00002-of-00003.gguf"
    os.link(file, part)
    with pytest.raises(KvcalError, match=r"is part 2 of 3 of a split GGUF.*llama-gguf-split --merge"):
        load_model(part)
    with pytest.raises(KvcalError, match=r"tiny.gguf@main: a file has no revision: give .*tiny.gguf$"):
        load_model(f"{file}@main")
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(KvcalError, match=r"pipe.gguf: is no plain file"):
        load_model(tmp_path / "pipe.gguf")
    (tmp_path / "notes.txt").write_text("GGUF in lower case")
    assert resolve_model(tmp_path / "notes.txt"), "the name does not matter, the first bytes do"
    (tmp_path / "notes.txt").write_text("some text")
    with pytest.raises(KvcalError, match="is a file: give the folder of the checkpoint, or a GGUF file"):
        load_model(tmp_path / "notes.txt")


@pytest.mark.parametrize("left", [200, 12_000, -1000])
def test_cut_off(file: Path, tmp_path: Path, left: int) -> None:
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:left])
    with pytest.raises(KvcalError, match=r"cut.gguf: is not a whole GGUF file \(.*ends.*fetch it again"):
        load_model(tmp_path / "cut.gguf")


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown-architecture": ({"architecture": "jamba"}, "architecture 'jamba' as GGUF"),
    "encoder": ({"architecture": "bert"}, "architecture 'bert' as GGUF"),
    "images": ({"architecture": "clip"}, "sees images for another model (clip)"),
    "adapter": ({"metadata": {"general.type": "adapter"}}, "is an adapter for another model"),
    "split": ({"metadata": {"split.count": 3, "split.no": 1}}, "is part 2 of 3 of a split GGUF"),
    "no-vocabulary": ({"metadata": {"tokenizer.ggml.tokens": None}}, "has no vocabulary"),
    "no-such-tokenizer": (
        {"metadata": {"tokenizer.ggml.model": "none"}},
        "its tokenizer is a 'none'",
    ),
    "token-outside": ({"metadata": {"tokenizer.ggml.bos_token_id": 1 << 30}}, "its tokenizer cannot be read"),
    "linear-rope": (
        {"metadata": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}},
        "llama.rope.scaling.type is linear, which transformers does not read",
    ),
    "scale": ({"metadata": {"llama.attention.scale": 0.5}}, "llama.attention.scale is 0.5, which transformers does"),
    "other-value-heads": ({"metadata": {"llama.attention.value_length": 4}}, "in transformers' config it is 8"),
    "long-rope": ({"tensors": {"rope_factors_long.weight": np.ones(4)}}, "among them rope_factors_long.weight"),
    "tensor-too-many": ({"tensors": {"blk.0.attn_q.bias": np.ones(32)}}, "the model that transformers builds"),
    "tensor-missing": ({"tensors": {"blk.1.ffn_up.weight": None}}, "the model that transformers builds"),
    "wrong-name": (
        {"tensors": {"blk.1.ffn_up.weight": None, "blk.1.ffn_up2.weight": np.ones((64, 32))}},
        "1 weights are not in it, e.g. model.layers.1.mlp.up_proj.weight",
    ),
    "layers-without-end": ({"metadata": {"llama.block_count": 4_000_000_000}}, "num_hidden_layers is '4000000000'"),
    "more-layers": ({"metadata": {"llama.block_count": 9_000}}, "has tensors of 2 layers and states 9000"),
    "huge-vocabulary": ({"metadata": {"llama.vocab_size": 1 << 27}}, "the model that transformers builds"),
    "heads-that-do-not-divide": ({"metadata": {"llama.attention.head_count_kv": 3}}, "cannot share 3 KV heads"),
    "list-for-a-number": ({"metadata": {"llama.block_count": [2]}}, "has tensors of 2 layers and states [2]"),
    "text-for-a-number": ({"metadata": {"llama.block_count": "many"}}, "num_hidden_layers is 'many'"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_would_be_another_model_is_refused(kind: str, model: Any, tmp_path: Path, cache: Path) -> None:
    changes, message = OTHERS[kind]
    path = gguf_files.write(tmp_path / "a.gguf", model, **changes)
    with pytest.raises(KvcalError, match=re.escape(message)) as caught:
        load_model(path, device="cpu")
    assert str(caught.value).startswith(str(path))
    assert not list(cache.glob("gguf/*")), "nothing is left of it"


@pytest.mark.parametrize(("layers", "refused"), [(62, True), (34, False)])
def test_gemma_of_27b_whose_query_scale_no_key_states(layers: int, refused: bool) -> None:
    from transformers import Gemma3TextConfig

    metadata = {"gemma3.block_count": layers, "gemma3.attention.sliding_window": 1024}
    header: Any = SimpleNamespace(architecture="gemma3", metadata=metadata, tensors=[])
    config = Gemma3TextConfig(num_hidden_layers=layers, sliding_window=1024)
    with pytest.raises(KvcalError, match="27B scales its queries") if refused else nullcontext():
        check_described(header, config, 0, "a.gguf")


def test_a_vocabulary_alone(model: Any, tmp_path: Path) -> None:
    none = dict.fromkeys(gguf_files.tensors_of(model))
    with pytest.raises(KvcalError, match="has a vocabulary and no weights"):
        load_model(gguf_files.write(tmp_path / "a.gguf", model, tensors=none))


def test_types_that_cannot_be_unpacked(file: Path, tmp_path: Path) -> None:
    """The type of the first tensor, in its entry behind its name, dimensions and shape, is one of integers."""
    content = bytearray(file.read_bytes())
    name = b"model.embed_tokens" if b"model.embed_tokens" in content else b"token_embd.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8
    assert content[at : at + 4] == bytes(4)
    content[at : at + 4] = int(Kind.I32).to_bytes(4, "little")
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(KvcalError, match=r"tensor token_embd.weight is of ggml type 26, which.*cannot unpack"):
        load_model(tmp_path / "a.gguf")


def test_without_the_package(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = converted.importlib.util.find_spec
    monkeypatch.setattr(
        converted.importlib.util, "find_spec", lambda name, *_: None if name == "gguf" else find_spec(name)
    )
    with pytest.raises(KvcalError, match=r"needs the package gguf: pip install 'kvcal\[models\]'"):
        load_model(file)


def test_transformers_and_gguf_are_as_before(file: Path) -> None:
    import transformers.modeling_gguf_pytorch_utils as reader

    before = gguf.GGUFReader, gguf.get_tensor_name_map, reader.tqdm
    load_model(file, device="cpu")
    assert (gguf.GGUFReader, gguf.get_tensor_name_map, reader.tqdm) == before
