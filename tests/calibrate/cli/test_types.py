"""Numbers of tokens and dtypes, as they are typed."""

from __future__ import annotations

import json

import click
import pytest
from cli_runs import refused, run

from kvcal.artifacts import KvcalError, load
from kvcal.calibrate import load_model
from kvcal.calibrate.cli.types import Dtype, TokenCount, TokenCounts

TEXT = "The quick brown fox jumps over the lazy dog. " * 60


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1", 1),
        ("8192", 2**13),
        ("8_192", 2**13),
        ("8k", 2**13),
        ("8K", 2**13),
        ("128k", 2**17),
        ("1M", 2**20),
        (" 2m ", 2**21),
        (17, 17),
        ("1_000k", 1024000),
    ],
)
def test_numbers_of_tokens(text: str | int, count: int) -> None:
    assert TokenCount().convert(text, None, None) == count


@pytest.mark.parametrize(
    "text", ["", "k", "1.5k", "-1", "+1", "1e3", "8 k", "8kk", "8b", "_8", "8__0", "٣", "0x10", "9" * 30, "inf", "True"]
)
def test_what_is_no_number_of_tokens(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a number of tokens"):
        TokenCount().convert(text, None, None)


@pytest.mark.parametrize(("least", "text"), [(1, "0"), (2, "1"), (17, "16"), (1, "9999999999999M")])
def test_numbers_out_of_range(least: int, text: str) -> None:
    with pytest.raises(click.BadParameter, match=f"give at least {least} and less than"):
        TokenCount(least).convert(text, None, None)


def test_several_numbers_of_tokens() -> None:
    assert TokenCounts().convert("512,2k, 1_024", None, None) == [512, 2048, 1024]
    for text in ("", ",", "512,x"):
        with pytest.raises(click.BadParameter):
            TokenCounts().convert(text, None, None)


NAMES = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16", "BF16": "bfloat16"}


@pytest.mark.parametrize(("short", "full"), [*NAMES.items(), ("auto", "auto"), ("float32", "float32")])
def test_names_of_dtypes(short: str, full: str) -> None:
    assert Dtype().convert(short, None, None) == full


def test_short_names_on_the_command_line_and_in_the_api(tmp_path, tiny_model_folder) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    options = ("--model", tiny_model_folder, "--data", tmp_path / "text.txt", "--num-tokens", "1k", "--seq-len", "64")
    run("pca", *options, "--output", tmp_path / "a", "--dtype", "bf16")
    artifact = load(tmp_path / "a")
    assert (artifact.settings["dtype"], artifact.data["blocks"] * 64) == ("bfloat16", 1024)
    assert str(load_model(tiny_model_folder, dtype="half").model.dtype) == "torch.float16"
    with pytest.raises(KvcalError, match=r"unknown dtype 'fp8': give auto, .*\(or fp32, bf16"):
        load_model(tiny_model_folder, dtype="fp8")
    assert "unknown dtype 'fp8'" in refused("pca", *options, "--dtype", "fp8")


def test_recipes_take_the_same_words(tmp_path, tiny_model_folder) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "r.yaml").write_text(
        f"recipe: 1\nmodel: {tiny_model_folder}\ndata: {tmp_path / 'text.txt'}\noutput: {tmp_path / 'a'}\n"
        "pca: {num_tokens: 1k, seq_len: 64, dtype: bf16, reservoir: 100}\n"
    )
    found = json.loads(run("run", "--recipe", tmp_path / "r.yaml", "--json").stdout)["stages"][0]["pca"]
    assert found["data"]["blocks"] * 64 == 1024 and found["settings"]["dtype"] == "bfloat16"
