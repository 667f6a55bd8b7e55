"""A checkpoint in 16 bits is one model in float32, too; rounded numbers are others, and that is said."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf_files
import pytest
import torch
from cli_runs import refused, run

from kvcal.artifacts import MismatchError, fingerprint, weights_sha256
from kvcal.artifacts.artifact import ModelIdentity
from kvcal.calibrate import load_model
from kvcal.calibrate.models import compare_weights

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROUNDED_HERE = "one of the two may be rounded: only the architecture was compared"
ROUNDED_THERE = "the artifact's are these rounded to"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> dict[torch.dtype, tuple[Path, Path]]:
    """Stored dtype -> (a checkpoint, one that differs in one weight)."""
    found = {}
    for dtype in (F32, BF16):
        model, folders = gguf_files.tiny_llama(), []
        for name in ("a", "b"):
            folders.append(tmp_path_factory.mktemp("checkpoints") / name)
            model.to(dtype).save_pretrained(folders[-1])
            tiny_tokenizer.save_pretrained(folders[-1])
            model.model.norm.weight[3] += 1
        found[dtype] = (folders[0], folders[1])
    return found


def calibrated_on(folder: Path, dtype: torch.dtype) -> Any:
    """What of an artifact is compared."""
    model = load_model(folder, device="cpu", dtype=str(dtype)[6:]).model
    identity = ModelIdentity("m", None, fingerprint(model.config), weights_sha256(model))
    return SimpleNamespace(name="a", settings={"dtype": str(dtype)[6:]}, model=identity)


@pytest.mark.parametrize(
    ("stored", "calibrated", "loaded", "same", "other"),
    [
        (BF16, F32, BF16, None, MismatchError),
        (BF16, BF16, F32, None, MismatchError),
        (BF16, BF16, BF16, None, MismatchError),
        (BF16, F16, F32, ROUNDED_THERE, MismatchError),
        (BF16, F32, F16, ROUNDED_HERE, ROUNDED_HERE),
        (F32, BF16, F32, ROUNDED_THERE, MismatchError),
        (F32, F32, BF16, ROUNDED_HERE, ROUNDED_HERE),
        (F32, F32, F32, None, MismatchError),
    ],
    ids=lambda value: str(value).removeprefix("torch.")[:12] if isinstance(value, torch.dtype) else "",
)
def test_what_is_compared(checkpoints: Any, stored: Any, calibrated: Any, loaded: Any, same: Any, other: Any) -> None:
    artifact = calibrated_on(checkpoints[stored][0], calibrated)
    for folder, expected in zip(checkpoints[stored], (same, other), strict=True):
        found = load_model(folder, device="cpu", dtype=str(loaded)[6:])
        if expected is MismatchError:
            with pytest.raises(MismatchError, match="was fitted on other weights"):
                compare_weights(artifact, found.model, found.exact)
            continue
        note = compare_weights(artifact, found.model, found.exact)
        assert note is None if expected is None else note is not None and expected in note


def test_models_whose_loading_rounds_a_part_only_are_not_called_others(checkpoints: Any) -> None:
    artifact = calibrated_on(checkpoints[F32][0], BF16)
    found = load_model(checkpoints[F32][1], device="cpu")
    found.model._keep_in_fp32_modules_strict = {"norm"}
    assert ROUNDED_HERE in str(compare_weights(artifact, found.model, found.exact))


def test_commands_and_the_harness_compare_in_another_dtype(
    checkpoints: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from kvcal.calibrate.harness import CompressedLM

    text = tmp_path / "a.txt"
    text.write_text("one two three four five six seven eight nine ten " * 40)
    same, other = checkpoints[BF16]
    made = ("--num-tokens", 256, "--seq-len", 64, "--output", tmp_path / "out")
    run("pca", "--model", same, "--data", text, "--dtype", "float32", "--device", "cpu", *made)
    asked = ("--data", text, "--prefix", 32, "--continuation", 8, "--windows", 1, "--tasks", "perplexity")
    there = ("evaluate", tmp_path / "out", *asked, "--dtype", "bfloat16", "--device", "cpu")
    assert "compared" not in run(*there).stderr
    assert "was fitted on other weights" in refused(*there, "--model", other)
    CompressedLM(pretrained=load_model(same, device="cpu", dtype="bfloat16"), artifact=tmp_path / "out")
    assert "rounded" not in caplog.text
    with pytest.raises(MismatchError, match="was fitted on other weights"):
        CompressedLM(pretrained=load_model(other, device="cpu", dtype="bfloat16"), artifact=tmp_path / "out")
    CompressedLM(pretrained=load_model(same, device="cpu", dtype="float16"), artifact=tmp_path / "out")
    assert ROUNDED_HERE in caplog.text
