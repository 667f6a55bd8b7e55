"""What was verified is what is used, whatever happens to the file afterwards."""

import copy
import pickle

import pytest
import torch
from samples import artifact

from kvcal.artifacts import ArtifactError, load, save, tensor_file

NAME = "layers.1.key_post.components"


@pytest.fixture(params=["kept in memory", "read again"])
def loaded(tmp_path, request, monkeypatch):
    """The stage `pca`, its file, and whether its content is kept."""
    save(artifact(), tmp_path / "a")
    if request.param == "read again":
        monkeypatch.setattr(tensor_file, "SMALL", 0)
    tensors = load(tmp_path / "a").stages["pca"].tensors
    return tensors, tensors.path, request.param == "kept in memory"


def expect_verified(tensors, before, kept):
    """The file is another now: what was kept is used, and nothing else."""
    if kept:
        assert torch.equal(tensors[NAME], before)
        return
    with pytest.raises(ArtifactError, match="was changed after the file was verified"):
        for name in tensors:
            tensors[name]


def test_tensors_are_those_that_were_saved(loaded):
    tensors, expected = loaded[0], artifact().stages["pca"].tensors
    assert set(tensors) == set(expected) and len(tensors) == len(expected)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    with pytest.raises(KeyError):
        tensors["nope"]


def test_what_is_written_into_the_file_afterwards_is_never_used(loaded):
    tensors, path, kept = loaded
    before = tensors[NAME]
    content = bytearray(path.read_bytes())
    for index in range(len(content) // 2, len(content)):
        content[index] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    expect_verified(tensors, before, kept)


@pytest.mark.parametrize("left", [0, 4000])
def test_a_file_that_is_cut_off_afterwards_ends_nothing(loaded, left):
    tensors, path, kept = loaded
    before = tensors[NAME]
    with path.open("r+b") as file:
        file.truncate(left)
    expect_verified(tensors, before, kept)


def test_a_file_that_is_replaced_or_removed_afterwards_is_still_the_old_one(loaded):
    tensors, path, _ = loaded
    before = tensors[NAME]
    path.with_name("other").write_bytes(b"other")
    path.with_name("other").rename(path)
    assert torch.equal(tensors[NAME], before)
    path.unlink()
    assert torch.equal(tensors[NAME], before)


def test_a_tensor_is_a_copy_of_ones_own(loaded):
    tensors = loaded[0]
    before = tensors[NAME].clone()
    tensors[NAME].zero_()
    assert torch.equal(tensors[NAME], before)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda tensors: pickle.loads(pickle.dumps(tensors))])
def test_copies_and_pickles_hold_the_tensors(loaded, again):
    tensors, path, _ = loaded
    found = again(tensors)
    path.unlink()
    assert found.keys() == tensors.keys() and torch.equal(found[NAME], tensors[NAME])


def test_a_tensor_is_read_once_when_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "SMALL", 0)
    found = save(artifact(), tmp_path / "a")
    reads = []
    real = tensor_file.TensorFile.__getitem__
    monkeypatch.setattr(
        tensor_file.TensorFile, "__getitem__", lambda self, name: (reads.append(name), real(self, name))[1]
    )
    found.tensor("pca", 1, "key_post.components")
    assert reads == [NAME]
