"""Files that strangers might send: each meets a named error that says what is wrong, and nothing in it is run.

A folder is a target of `fuzz_targets`, a file an input of it; `make fuzz` starts from them, too.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from fuzz_targets import TARGETS, refusal
from huggingface_hub import constants
from samples import artifact

from kvcal.artifacts import ArtifactError, KvcalError, load, save
from kvcal.calibrate.data import open_data

HERE = Path(__file__).parent
FILES = sorted(path for target in TARGETS for path in (HERE / target).iterdir())
USUAL = {
    "manifest": "malformed manifest",
    "stage_file": "not a readable safetensors file",
    "recipe": "is not valid YAML",
    "data_spec": "data ",
    "text_file": "cannot be read",
    "gguf_file": "is not a whole GGUF file",
}
SAID = {
    "manifest/empty.json": "not valid JSON",
    "manifest/half-a-character.json": "surrogates not allowed",
    "manifest/hundreds-of-levels.json": "more than 400 levels",
    "manifest/infinite.json": "not JSON compliant",
    "manifest/list.json": "a JSON object is expected",
    "manifest/negative-size.json": "pca.00000000.safetensors: cannot be read",
    "manifest/newer.json": "newer than this kvcal reads",
    "manifest/not-a-number.json": "not JSON compliant",
    "manifest/number-of-5000-digits.json": "not valid JSON",
    "manifest/open-brackets.json": "not valid JSON",
    "manifest/terminal-escape-in-a-name.json": r"'\x1b[2J  Error'",
    "manifest/thousands-of-levels.json": "not valid JSON",
    "manifest/utf-16.json": "not valid JSON",
    "stage_file/name-with-line-ends-and-escapes": "tensor layers.0.key_post.mean is missing",
    "recipe/alias-bomb.yaml": "aliases (*) are not allowed",
    "recipe/alias-of-itself.yaml": "aliases (*) are not allowed",
    "recipe/escape-in-a-name.yaml": r"no '\x1b[2J' there",
    "recipe/path-with-a-zero-byte.yaml": "pca.seed: expected a whole number",
    "recipe/thousands-of-brackets.yaml": "lists in lists",
    "recipe/thousands-of-levels.yaml": "lists in lists",
    "recipe/twice.yaml": "recipe stands there twice",
    "data_spec/ats": "org/name@@@: no name of a branch",
    "data_spec/root-as-a-revision": "org/name@/: no name of a branch",
    "data_spec/empty": "data: an empty name",
    "data_spec/white-space": "data: an empty name",
    "data_spec/home-of-nobody": "~no-such-user/a.txt: does not exist (",
    "data_spec/too-long": "does not exist (",
    "data_spec/too-long-for-a-glob": "does not exist (",
    "gguf_file/escape-in-the-architecture": "has a vocabulary and no weights",
    "gguf_file/layers-without-end": "num_hidden_layers is '9223372036854775808'",
    "gguf_file/no-such-quantisation": "of ggml type 999",
    "gguf_file/split-without-a-number": "is one of 3 parts of a split GGUF",
    "gguf_file/tensor-of-half-a-block": "no whole blocks of 32",
    "gguf_file/type-is-a-list": "has a vocabulary and no weights",
    "text_file/json-cut-off": "row 1: is not valid JSON",
    "text_file/json-no-text": "none is plainly the text",
    "text_file/json-number": "row 1: is a int",
    "text_file/json-text-changes-its-type": "row 2: column 'text' holds dict",
    "text_file/json-thousands-of-levels": "row 1: is not valid JSON",
    "text_file/txt-not-utf-8": "not UTF-8 text",
    "text_file/txt-zero-byte": "binary data, not text",
}


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_an_abusive_file_is_refused_by_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refusal(path.parent.name, path.read_bytes())
    assert message is not None and SAID.get(name_of(path), USUAL[path.parent.name]) in message


def test_every_expected_refusal_has_its_file() -> None:
    assert SAID.keys() <= {name_of(path) for path in FILES}


@pytest.mark.parametrize("which", ["manifest.json", "pca"])
@pytest.mark.parametrize("put", ["pipe", "endless device", "folder", "link to itself"])
def test_what_is_no_plain_file_is_not_waited_for(tmp_path: Path, which: str, put: str) -> None:
    folder = save(artifact(), tmp_path / "a").folder
    path = next(folder.glob(f"{which}*"))
    path.unlink()
    if put == "pipe":
        os.mkfifo(path)
    elif put == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if put == "endless device" else path)
    errors: list[BaseException] = []

    def attempt() -> None:
        try:
            load(folder)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(30)
    assert len(errors) == 1 and isinstance(errors[0], ArtifactError), errors


def test_a_card_with_a_name_of_a_file_that_no_disk_can_hold(tmp_path: Path) -> None:
    card = f"---\nconfigs:\n- config_name: plain\n  data_files: {'a' * 300}.txt\n---\n"
    (tmp_path / "README.md").write_text(card)
    with pytest.raises(KvcalError, match="cannot be read"):
        open_data(tmp_path)
