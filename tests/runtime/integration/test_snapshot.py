"""A saved and reloaded cache goes on as if nothing had happened, or says why it cannot."""

import json
import struct
from dataclasses import replace

import pytest
import torch
from compressed import CLOSE, SMALL, artifact, close, greedy, make_cache, model, padded, random_ids, traces

from kvcal.artifacts import KvcalError
from kvcal.runtime import CompressedCache, compress

FILE = "cache.safetensors"


def conversation(cache, name, tokens=None):
    """A padded prompt of three rows, or what follows it."""
    inputs = padded(9, 23, 40)
    if tokens is None:
        return greedy(model(name), inputs, past_key_values=cache)
    ids = torch.cat((tokens, torch.cat([random_ids(5, seed=70 + row) for row in range(3)])), 1)
    mask = torch.ones_like(ids)
    mask[:, :40] = inputs["attention_mask"]
    return greedy(model(name), {"input_ids": ids, "attention_mask": mask}, past_key_values=cache)


@pytest.mark.parametrize("method", SMALL)
@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral-window"])
@pytest.mark.filterwarnings("ignore:kvcal. no layer")
def test_a_loaded_cache_goes_on_as_the_saved_one(method, name, tmp_path):
    cache = make_cache(method, name)
    tokens = conversation(cache, name)[0]
    cache.save(tmp_path / "new" / "folder")
    expected = conversation(cache, name, tokens)
    loaded = CompressedCache.load(tmp_path / "new" / "folder", model(name), artifact(name))
    assert loaded.blueprint.methods == cache.blueprint.methods
    assert loaded.get_seq_length() == tokens.shape[1] - 1
    with compress(model(name), artifact(name), "full"):
        found = conversation(loaded, name, tokens)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], **close(method))


def test_methods_by_layer_and_empty_caches_come_back(tmp_path):
    settings = {"method": {"0": "full", "1-": "loki"}, "rank": {"0-1": 4, "2": "variance:0.9"}, "keep": [1, 0.5, 0.25]}
    cache = CompressedCache(model(), artifact(), **settings, basis="pca", select="head")
    cache.save(tmp_path)
    loaded = CompressedCache.load(tmp_path, model(), artifact())
    assert loaded.blueprint.methods == cache.blueprint.methods and loaded.get_seq_length() == 0
    expected, found = (conversation(each, "llama")[1] for each in (cache, loaded))
    torch.testing.assert_close(found, expected, **CLOSE)


def test_a_loaded_cache_can_be_moved_and_copied_rows(tmp_path):
    cache = make_cache("loki")
    conversation(cache, "llama")
    cache.save(tmp_path)
    loaded = CompressedCache.load(tmp_path, model(), artifact())
    assert all(layer.is_initialized for layer in loaded.layers)
    for layer in loaded.layers:
        layer.offload()
        layer.prefetch()
    loaded.batch_select_indices(torch.tensor([1]))
    assert [store.lengths for store in loaded.stores.values()] == [[23 + 5]] * 3


@pytest.mark.parametrize("cropped", [12, 11, 13, 20])
def test_clusters_of_a_prompt_that_was_cropped(tmp_path, cropped):
    """To the end of a segment that was clustered at once, and around it."""
    cache, ids = make_cache("clusterkv", segment=8), random_ids(36)
    with torch.no_grad():
        model()(ids[:, :30], past_key_values=cache)
        cache.crop(-cropped)
        cache.save(tmp_path)
        loaded = CompressedCache.load(tmp_path, model(), artifact())
        for at in range(30 - cropped, 30 - cropped + 5):
            one, other = (model()(ids[:, at : at + 1], past_key_values=each).logits for each in (cache, loaded))
            torch.testing.assert_close(one, other, **CLOSE)


@pytest.fixture
def saved(tmp_path):
    cache = make_cache("loki", keep=0.5)
    greedy(model(), {"input_ids": random_ids(20)}, past_key_values=cache)
    cache.save(tmp_path)
    del cache
    return tmp_path


def edited(path, change):
    """The file with another header."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    ours = json.loads(header["__metadata__"]["kvcal"])
    change(header, ours)
    header["__metadata__"]["kvcal"] = json.dumps(ours)
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :])


def test_other_models_artifacts_and_files_are_refused(saved, tmp_path):
    before = traces(model())
    cases = {
        "of another model": (
            lambda: (model("qwen2"), artifact("qwen2")),
            "saved with a model of model_type llama, this model has qwen2",
        ),
        "of another artifact": (lambda: (model(), artifact("llama", 1)), "was saved with artifact"),
        "without an artifact": (lambda: (model(), None), "was saved with artifact .* given is None"),
    }
    for arguments, message in cases.values():
        with pytest.raises(KvcalError, match=message) as caught:
            CompressedCache.load(saved, *arguments())
        assert "\n" not in str(caught.value)
    del caught
    with pytest.raises(KvcalError, match=r"cache\.safetensors: no saved cache there: write one"):
        CompressedCache.load(saved / "elsewhere", model(), artifact())
    assert traces(model()) == before


def test_a_cache_of_an_artifact_that_was_never_saved_cannot_be_told_from_others(tmp_path):
    cache = CompressedCache(model(), replace(artifact(), content_hash=None))
    with pytest.raises(KvcalError, match="save the artifact first"):
        cache.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file_is_refused_in_one_line(tmp_path):
    path = tmp_path / "taken"
    path.write_text("mine")
    with pytest.raises(KvcalError, match=r"taken: the cache cannot be saved there \([^\n]+give another folder$"):
        CompressedCache(model(), None, "full").save(path)
    assert path.read_text() == "mine"


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "not safetensors": lambda path: path.write_text("hello"),
    "no header of ours": lambda path: edited(path, lambda header, ours: ours.clear()),
    "of a later version": lambda path: edited(path, lambda header, ours: ours.update(version=99)),
    "an unknown method": lambda path: edited(path, lambda header, ours: ours["methods"]["0"].update(method="x")),
    "an unknown parameter": lambda path: edited(path, lambda header, ours: ours["methods"]["0"].update(spin=1)),
    "a layer too many": lambda path: edited(path, lambda header, ours: ours["methods"].update({"7": {}})),
    "methods that are no mapping": lambda path: edited(path, lambda header, ours: ours.update(methods=3)),
    "a model that is no mapping": lambda path: edited(path, lambda header, ours: ours.update(model=3)),
    **{
        f"a bit of {name}": lambda path, name=name: flip(path, name)
        for name in ("tokens.key", "tokens.value", "lengths")
    },
    "a tensor missing": lambda path: edited(path, lambda header, ours: rename(header, "layers.1.lengths", "x")),
    "keys missing": lambda path: edited(path, lambda header, ours: rename(header, "layers.1.tokens.key", "x")),
}


def flip(path, name):
    """One bit of the first number of a tensor."""
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    content[8 + size + header[f"layers.0.{name}"]["data_offsets"][0]] ^= 4
    path.write_bytes(content)


def rename(header, old, new):
    header[new] = header.pop(old)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_told_in_one_line(damage, saved):
    before = traces(model())
    DAMAGES[damage](saved / FILE)
    with pytest.raises(KvcalError) as caught:
        CompressedCache.load(saved, model(), artifact())
    assert "\n" not in str(caught.value) and str(saved / FILE) in str(caught.value)
    del caught
    assert traces(model()) == before
