"""A model and text by name go the way of those that are loaded already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvcal.artifacts import KvcalError
from kvcal.calibrate import calibrate, load_model, make_blocks, open_data

SMALL = {"num_tokens": 512, "seq_len": 64}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    path.write_text("".join(f"line {number} of {number * number}\n" for number in range(200)))
    return path


@pytest.fixture(scope="module")
def by_hand(tiny_model_folder: Path, text: Path) -> Any:
    loaded, data = load_model(tiny_model_folder), open_data(text)
    return loaded, make_blocks(data, loaded.tokenizer, source=data.source, **SMALL)


def test_names_give_the_artifact_of_what_they_name(tiny_model_folder: Path, text: Path, by_hand: Any, tmp_path: Path):
    loaded, blocks = by_hand
    expected = calibrate(loaded.model, blocks, model_id=loaded.source.id).save_pretrained(tmp_path / "expected")
    named = calibrate(tiny_model_folder, text, **SMALL).save_pretrained(tmp_path / "named")
    assert named.content_hash == expected.content_hash
    tokenised = calibrate(loaded.model, text, tokenizer=loaded.tokenizer, model_id=loaded.source.id, **SMALL)
    assert tokenised.save_pretrained(tmp_path / "tokenised").content_hash == expected.content_hash


def test_blocks_are_as_long_as_the_models_context_where_nobody_says(tiny_model_folder: Path, text: Path):
    assert calibrate(tiny_model_folder, [text], num_tokens=512).data["seq_len"] == 128


@pytest.mark.parametrize(
    ("given", "named", "message"),
    [
        ("blocks", {"num_tokens": 512}, "num_tokens: has no meaning beside token blocks: leave it out"),
        ("text", {}, "data: text is cut into the model's tokens: give its tokenizer=, or name the model, too"),
        ("text", {"device": "cpu"}, "device: has no meaning beside a model that is loaded already: leave it out"),
        ("nothing", {}, "no-such-text: "),
    ],
)
def test_what_does_not_go_together_is_one_line(by_hand: Any, text: Path, given: str, named: Any, message: str):
    loaded, blocks = by_hand
    data = {"blocks": blocks, "text": text, "nothing": "./no-such-text"}[given]
    with pytest.raises(KvcalError) as caught:
        calibrate(loaded.model, data, **named)
    assert message in str(caught.value)


def test_unknown_parameters_are_refused(by_hand: Any):
    loaded, blocks = by_hand
    with pytest.raises(KvcalError, match="calibrate has no parameter 'num_tokns': did you mean num_tokens"):
        calibrate(loaded.model, blocks, num_tokns=64)


def test_a_revision_stands_in_the_models_name(tiny_model_folder: Path, text: Path):
    with pytest.raises(
        KvcalError, match=f"revision 'v1': has no meaning beside a named model: write {tiny_model_folder}@v1"
    ):
        calibrate(tiny_model_folder, text, revision="v1")


def test_a_named_model_brings_its_tokenizer(tiny_model_folder: Path, text: Path, by_hand: Any):
    with pytest.raises(KvcalError, match="tokenizer: has no meaning beside a named model"):
        calibrate(tiny_model_folder, text, tokenizer=by_hand[0].tokenizer)


def test_blocks_and_models_are_shown_in_a_line(by_hand: Any):
    loaded, blocks = by_hand
    for shown in (loaded, blocks):
        assert "\n" not in repr(shown) and len(repr(shown)) < 250
    assert f"{len(blocks)} of {blocks.seq_len}" in repr(blocks) and "LlamaForCausalLM" in repr(loaded)
