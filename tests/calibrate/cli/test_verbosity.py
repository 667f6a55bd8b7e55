"""--quiet: errors and the result only. --verbose: what runs, from where, how long, and where errors come from."""

from __future__ import annotations

import json

import pytest
from cli_runs import invoke, refused, run

from kvcal.artifacts import load

TEXT = "The quick brown fox jumps over the lazy dog. " * 60
SMALL = ("--num-tokens", 256, "--seq-len", 64)


@pytest.fixture(scope="module")
def given(tmp_path_factory, tiny_model_folder):
    """Options that say model and text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return ("--model", tiny_model_folder, "--data", path)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, given):
    folder = tmp_path_factory.mktemp("artifact") / "a"
    run("pca", *given, "--output", folder, *SMALL)
    return folder


def test_quiet_prints_where_the_result_is_and_nothing_else(tmp_path, given, tiny_model_folder) -> None:
    folder = tmp_path / "a"
    commands = [
        (("pca", *given, "--output", folder, *SMALL), folder),
        (("cluster", folder, "--clusters", 4, "--plot", tmp_path / "c.png"), folder),
        (("xcla", folder, "--model", tiny_model_folder, "--memory", 0.5), folder),
        (("share", folder, "--model", tiny_model_folder), folder),
        (("export", folder, "--model", tiny_model_folder, "--output", tmp_path / "shared"), tmp_path / "shared"),
    ]
    for arguments, place in commands:
        done = run(*arguments, "--quiet")
        assert done.stdout == f"{place}\n" and done.stderr == "", arguments
    assert run("-q", "verify", folder).stdout == f"{load(folder).content_hash}\n"


def test_quiet_still_answers_and_still_fails(artifact, tmp_path) -> None:
    for command in ("analyze-rank", "inspect"):
        loud, quiet = run(command, artifact), run("--quiet", command, artifact)
        assert quiet.stdout == loud.stdout != "" and quiet.stderr == ""
    assert json.loads(run("inspect", artifact, "-q", "--json").stdout)["layers"] == 2
    assert "does not exist" in refused("-q", "inspect", tmp_path / "nowhere")


def test_a_quiet_command_leaves_the_next_one_loud(artifact) -> None:
    run("inspect", "-q", artifact)
    assert "few for a head dim" in run("inspect", artifact).stderr


@pytest.mark.parametrize("before", [True, False])
def test_verbose_says_what_runs(tmp_path, given, tiny_model_folder, before: bool) -> None:
    command = ("pca", *given, "--output", tmp_path / "a", *SMALL)
    done = run(*(("-v", *command) if before else (*command, "--verbose")))
    for part in ("torch 2.", "num_tokens 256", f"from {tiny_model_folder}", "float32 on cpu", "4 blocks of 64 tokens"):
        assert part in done.stderr, part
    for phase in ("finding the text", "loading the model", "calibrating", "writing"):
        assert f"  {phase}: " in done.stderr
    assert done.stdout == run(*command).stdout, "what was found is no other"


def test_verbose_shows_where_an_error_was_raised_and_what_caused_it(tmp_path, given) -> None:
    (tmp_path / "model").mkdir()
    for path in given[1].iterdir():
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    command = ("pca", "--model", tmp_path / "model", "--data", given[3], "--output", tmp_path / "a", *SMALL)
    line = refused(*command)
    loud = invoke(*command, "-v")
    assert loud.exit_code == 2 and loud.stderr.splitlines()[-1] == line
    assert "Traceback (most recent call last):" in loud.stderr and "direct cause" in loud.stderr
    assert "SafetensorError" in loud.stderr and "SafetensorError" not in line


def test_not_both(artifact) -> None:
    for arguments in (("-q", "-v", "inspect", artifact), ("-q", "inspect", "-v", artifact)):
        assert "--quiet and --verbose: give one of them" in refused(*arguments)
