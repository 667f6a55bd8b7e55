"""An exported checkpoint is the artifact's sharing, bit for bit, without the reading layers' keys and values."""

import json
import shutil

import pytest
import torch
from architectures import HEAD_DIM, HEADS, KV_HEADS, build
from cla_samples import GROUPS, train
from compressed import greedy, padded, random_ids
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kvcal.artifacts import Artifact, KvcalError, Layer, ModelIdentity, Stage, fingerprint, weights_sha256
from kvcal.calibrate import load_model
from kvcal.calibrate.cla.export import export
from kvcal.calibrate.models import LoadedModel, ModelSource
from kvcal.runtime import check_model, compress
from kvcal.runtime.cla import load_cla, save_cla, sharing_of
from kvcal.runtime.cla.file import ClaFile
from kvcal.runtime.integration.contexts import shared_for

NAMES = ["llama", "qwen2", "qwen3", "phi3", "gpt2", "gpt-neox"]
IDS = torch.cat((random_ids(21), random_ids(21, seed=1)))


def sharing_artifact(of, groups=str(GROUPS), trained=True):
    """In memory, with nothing but a stage `cla`."""
    config = of.config
    layers = tuple(Layer(i, 2, 4, 12, 12, 0.3, None, "unrotate") for i in range(config.num_hidden_layers))
    identity = ModelIdentity("random", None, fingerprint(config), weights_sha256(of))
    found = train(of, steps=2, lr=1e-2) if trained else None
    tensors = {f"weights.{name}": weight for name, weight in found.weights.items()} if found else {}
    settings = {"groups": groups, "pool": "mean", "uptraining": dict(found.settings) if found else None}
    return Artifact(identity, layers, {}, {}, {}, {"cla": Stage(tensors, settings)})


class Tokenizer:
    """What `export` asks of one."""

    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def exported(of, folder, **settings):
    found = sharing_artifact(of, **settings)
    export(found, LoadedModel(of, Tokenizer(), ModelSource("random", None, None)), folder)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_artifacts_sharing_bit_for_bit(tmp_path, name):
    of = build(name)
    found = exported(of, tmp_path / "out")
    loaded = load_cla(tmp_path / "out")
    assert str(sharing_of(loaded).map) == str(GROUPS) and not loaded.training
    own = loaded.state_dict()
    with shared_for(of, found, "cla", {}), torch.no_grad():
        expected = of.state_dict()
        assert own.keys() == expected.keys() and all(torch.equal(own[name], expected[name]) for name in own)
        logits = of(IDS, use_cache=False).logits
    with torch.no_grad():
        # The same numbers at other addresses: small products may be summed in another order.
        torch.testing.assert_close(loaded(IDS, use_cache=False).logits, logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_trained_on_it_is_saved_again(tmp_path, name):
    exported(build(name), tmp_path / "out", trained=False)
    loaded = load_cla(tmp_path / "out")
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(0.01)
    save_cla(loaded, tmp_path / "again")
    again = load_cla(tmp_path / "again")
    own, expected = again.state_dict(), loaded.state_dict()
    assert own.keys() == expected.keys() and all(torch.equal(own[key], expected[key]) for key in own)
    assert sharing_of(again).map == sharing_of(loaded).map
    with pytest.raises(KvcalError, match="already exists"):
        save_cla(loaded, tmp_path / "again")
    with pytest.raises(KvcalError, match=r"its layers share nothing: save it with model.save_pretrained"):
        save_cla(build(name), tmp_path / "third")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "again"}


def test_a_group_is_stored_once_in_caches_of_ours_and_by_each_layer_in_transformers_own(tmp_path):
    exported(build("llama"), tmp_path / "out", trained=False)
    loaded = load_cla(tmp_path / "out")
    assert 'with compress(model, method="full"):' in (tmp_path / "out" / "README.md").read_text()
    token = 2 * KV_HEADS * HEAD_DIM * 4  # bytes of keys and values of one layer
    plain = loaded(IDS, use_cache=True).past_key_values
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers) == 3 * IDS.numel() * token
    original, caches = build("llama"), []
    for of in (loaded, original):
        with compress(of, method="full"):
            caches.append(of(IDS, use_cache=True).past_key_values)
    ours, alone = caches
    assert len(set(map(id, ours.stores.values()))) == 2
    assert 3 * ours.resident_bytes() == 2 * alone.resident_bytes()


def test_the_original_models_artifact_is_told_by_weights_only(tmp_path):
    of = build("llama")
    found = exported(of, tmp_path / "out", trained=False)
    loaded = load_cla(tmp_path / "out")
    check_model(found, loaded)
    with pytest.raises(KvcalError, match="other weights"):
        check_model(found, loaded, weights=True)


def test_it_decodes_what_the_method_cla_decodes(tmp_path):
    of = build("llama")
    found = exported(of, tmp_path / "out")
    loaded = load_cla(tmp_path / "out")
    for method, settings in (("full", {}), ("quest", {"keep": 0.5, "page": 4})):
        with compress(of, found, method="cla" if method == "full" else f"cla+{method}", **settings):
            expected = greedy(of, padded(9, 23))
        with compress(loaded, None, method=method, **settings):
            tokens, logits, cache = greedy(loaded, padded(9, 23))
        assert torch.equal(tokens, expected[0])
        torch.testing.assert_close(logits, expected[1], rtol=1e-6, atol=1e-6)
        assert cache.resident_bytes() == expected[2].resident_bytes()
    plain = greedy(loaded, padded(9, 23), use_cache=True)[0]
    with shared_for(of, found, "cla", {}):
        assert torch.equal(plain, greedy(of, padded(9, 23), use_cache=True)[0])


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("llama", {"model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.v_proj.weight"}),
        ("qwen3", {f"model.layers.1.self_attn.{part}.weight" for part in ("k_proj", "v_proj", "k_norm")}),
        ("phi3", set()),
    ],
)
def test_keys_and_values_of_reading_layers_are_not_in_the_file(tmp_path, name, left_out):
    of = build(name)
    exported(of, tmp_path / "out", trained=False)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert {key for key in of.state_dict() if key not in names} == left_out
        if name == "phi3":  # of the joint projection the queries' rows
            assert file.get_slice("model.layers.1.self_attn.qkv_proj.weight").get_shape()[0] == HEADS * HEAD_DIM
            assert (
                file.get_slice("model.layers.2.self_attn.qkv_proj.weight").get_shape()[0]
                == (HEADS + 2 * KV_HEADS) * HEAD_DIM
            )


def test_tied_weights_are_written_once_and_tied_again(tmp_path):
    of = build("gemma2")
    assert of.lm_head.weight is of.get_input_embeddings().weight
    exported(of, tmp_path / "out", groups="1", trained=False)  # its other layers have a window
    assert sum("embed" in name or "lm_head" in name for name in load_file(tmp_path / "out" / "model.safetensors")) == 1
    loaded = load_cla(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    with torch.no_grad():
        assert torch.equal(loaded(IDS, use_cache=False).logits, of(IDS, use_cache=False).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_is_that_of_the_export_unless_another_is_asked_for(tmp_path, dtype):
    exported(build("llama", dtype=dtype), tmp_path / "out", trained=False)
    assert load_cla(tmp_path / "out").dtype == dtype
    assert load_cla(tmp_path / "out", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_it_shares_for_good(tmp_path):
    exported(build("llama"), tmp_path / "out", trained=False)
    loaded = load_cla(tmp_path / "out")
    with pytest.raises(KvcalError, match="for good"):
        sharing_of(loaded).remove()
    with pytest.raises(KvcalError, match="already"), compress(loaded, method="cla", groups="0-2"):
        pass
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_the_model_is_found_by_name_as_any_other(tmp_path, tiny_model_folder, tiny_tokenizer):
    loaded = load_model(tiny_model_folder)
    found = sharing_artifact(loaded.model, groups="0-1", trained=False)
    export(found, loaded, tmp_path / "out")
    again = load_model(tmp_path / "out")
    assert str(sharing_of(again.model).map) == "0-1" and again.model.dtype == torch.float32
    assert again.tokenizer("some text")["input_ids"] == tiny_tokenizer("some text")["input_ids"]
    with shared_for(loaded.model, found, "cla", {}), torch.no_grad():
        assert torch.equal(again.model(IDS, use_cache=False).logits, loaded.model(IDS, use_cache=False).logits)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "out"
    exported(build("llama"), folder, trained=False)
    return folder


def broken(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "broken")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "upgrade kvcal"),
        ({"format": "other"}, "cannot be read"),
        ({"groups": 5}, "cannot be read"),
        ({"groups": "0-7"}, "layers 0 to 2"),
        ({"groups": "0-2"}, "has unexpected model.layers.2"),
        ({"groups": "0,1,2"}, "lacks model.layers.1.self_attn.k_proj.weight and 1 more"),
        ({"dtype": "int4"}, "bfloat16"),
        ({"origin": "\x1b[2J"}, "cannot be read"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(checkpoint, tmp_path, change, message):
    path = broken(checkpoint, tmp_path) / "kvcal_cla.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(KvcalError, match=message):
        load_cla(path.parent)


def test_a_config_names_no_kernel_and_leads_nowhere(checkpoint, tmp_path):
    """The folder may be a stranger's, too."""
    folder = broken(checkpoint, tmp_path)
    body = json.loads((folder / "config.json").read_text())
    kernels = {"attn_implementation": "org/name", "auto_map": {"AutoModelForCausalLM": "x.Y"}}
    (folder / "config.json").write_text(json.dumps({**body, **kernels}))
    assert load_cla(folder).config._attn_implementation == "sdpa"
    (folder / "config.json").write_text(json.dumps({**body, "vocab_size": 1 << 24}))
    with pytest.raises(KvcalError, match=r"config\.json describes a model of"):
        load_cla(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(checkpoint / "config.json")
    with pytest.raises(KvcalError, match=r"config\.json is a link out of this folder"):
        load_cla(folder)


def test_folders_that_are_no_such_checkpoint_are_refused(checkpoint, tmp_path, tiny_model_folder):
    with pytest.raises(KvcalError, match="calibrate export"):
        load_cla(tiny_model_folder)
    with pytest.raises(KvcalError, match="calibrate export"):
        load_cla(tmp_path / "nowhere")
    folder = broken(checkpoint, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.norm.weight": torch.zeros(5)}, folder / "model.safetensors")
    with pytest.raises(KvcalError, match=r"model\.norm\.weight has shape \[5\]"):
        load_cla(folder)
    for content in (b"", b"x" * 100):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(KvcalError, match=r"export the model again|get a whole checkpoint"):
            load_cla(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(KvcalError, match="config"):
        load_cla(folder)


def test_nothing_is_overwritten_and_nothing_is_left_half_written(tmp_path, monkeypatch):
    of = build("llama")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    with pytest.raises(KvcalError, match="already exists"):
        exported(of, tmp_path / "there", trained=False)
    monkeypatch.setattr(ClaFile, "dumps", lambda self: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(KvcalError, match="No space left"):
        exported(of, tmp_path / "full", trained=False)
    assert [path.name for path in tmp_path.iterdir()] == ["there"] and sharing_of(of) is None
    with pytest.raises(KvcalError, match="no stage cla"):
        export(without_stage(of), LoadedModel(of, Tokenizer(), ModelSource("r", None, None)), tmp_path / "o")


def without_stage(of):
    found = sharing_artifact(of, trained=False)
    return Artifact(found.model, found.layers, {}, {}, {}, {})
