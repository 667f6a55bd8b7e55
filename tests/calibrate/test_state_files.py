"""The state of interrupted work: a flipped bit is noticed wherever it is."""

import pytest
import torch

from kvcal.artifacts import ArtifactError
from kvcal.calibrate.state_files import read_state, write_state

BODY = {"run": "r", "count": 7, "mean": [0.5, 1.5]}
TENSORS = {"sum": torch.arange(3, dtype=torch.float64), "seen": torch.tensor([True, False])}
FAULTS = (OSError, ValueError, LookupError, TypeError, AttributeError, ArtifactError)


@pytest.fixture
def commit(tmp_path):
    write_state(tmp_path / "part.1.json", "part.1", BODY, TENSORS)
    return tmp_path / "part.1.json"


def test_what_is_written_is_read(commit):
    body, tensors = read_state(commit)
    assert body == BODY and tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("pattern", ["*.json", "*.safetensors"])
def test_any_flipped_bit_is_noticed(commit, pattern):
    (path,) = commit.parent.glob(pattern)
    content = path.read_bytes()
    for index in range(len(content)):
        flipped = bytearray(content)
        flipped[index] ^= 1 << index % 8
        path.write_bytes(flipped)
        with pytest.raises(FAULTS):
            read_state(commit)


def test_a_state_names_no_file_elsewhere(commit, tmp_path):
    text = commit.read_text()
    (path,) = commit.parent.glob("*.safetensors")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "part.1.json").write_text(text.replace(path.name, f"../{path.name}"))
    with pytest.raises(FAULTS):
        read_state(tmp_path / "sub" / "part.1.json")


def test_tensors_that_are_linked_are_refused(commit, tmp_path):
    (path,) = commit.parent.glob("*.safetensors")
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="is a link"):
        read_state(commit)
