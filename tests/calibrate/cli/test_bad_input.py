"""Bad input: exit code 2, one line that says what, where and what to do; nothing half-written, nothing lost."""

import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner

from kvcal.calibrate.cli import cli

TEXT = "The quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, tiny_model_folder):
    folder = tmp_path_factory.mktemp("artifact") / "a"
    text = folder.parent / "text.txt"
    text.write_text(TEXT)
    done = refused_or_done("pca", "--model", tiny_model_folder, "--data", text, "--output", folder, *SMALL)
    assert done.exit_code == 0, done.output
    return folder


SMALL = ("--num-tokens", 256, "--seq-len", 64)


def refused_or_done(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def refused(*arguments):
    """The one line of an error, after checking that it is one line on stderr and the exit code is 2."""
    result = refused_or_done(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("reading text")]
    assert len(lines) == 1 and lines[0].startswith("Error: "), result.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "mistral-7"), "mistral-7b"),
        (("--data", "wikitxt"), "wikitext"),
        (("--data", "no/such/file.txt"), "file.txt"),
        (("--seq-len", 4096), "context of 128"),
        (("--seq-len", 1), "--seq-len"),
        (("--num-tokens", 0), "--num-tokens"),
        (("--device", "cuda"), "cuda"),
        (("--device", "tpu"), "tpu"),
        (("--dtype", "int3"), "int3"),
        (("--split", "nowhere"), "split"),
        (("--data", ""), "empty name"),
        (("--data", "x" * 300 + ".txt"), "xxx.txt"),
    ],
)
def test_pca_options(tmp_path, tiny_model_folder, text, options, message):
    given = {"--model": tiny_model_folder, "--data": text, "--output": tmp_path / "out", "--seq-len": 64}
    given |= dict([options])
    error = refused("pca", *[part for option in given.items() for part in option])
    assert message in error
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_fewer_tokens_than_one_block(tmp_path, tiny_model_folder):
    (tmp_path / "short.txt").write_text("too short")
    error = refused(
        "pca", "--model", tiny_model_folder, "--data", tmp_path / "short.txt", "--output", tmp_path / "o", *SMALL
    )
    assert "only 9 tokens, fewer than one block of 64" in error


@pytest.mark.parametrize(
    ("name", "data"), [("empty.txt", b""), ("binary.txt", bytes(range(256)) * 20), ("x.json", b"{")]
)
def test_empty_and_non_text_data(tmp_path, tiny_model_folder, name, data):
    (tmp_path / name).write_bytes(data)
    assert name in refused(
        "pca", "--model", tiny_model_folder, "--data", tmp_path / name, "--output", tmp_path / "o", *SMALL
    )


def test_output_that_is_not_an_artifact_is_kept(tmp_path, tiny_model_folder, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    error = refused("pca", "--model", tiny_model_folder, "--data", text, "--output", tmp_path / "out", *SMALL)
    assert "exists and is not an artifact: choose another --output" in error
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_output_of_another_run_is_kept(artifact, tiny_model_folder, text):
    before = {path.name: path.read_bytes() for path in artifact.iterdir()}
    error = refused("pca", "--model", tiny_model_folder, "--data", text, "--output", artifact, *SMALL, "--seed", 7)
    assert "another run" in error and "seed" in error
    assert {path.name: path.read_bytes() for path in artifact.iterdir()} == before


def test_output_of_another_model_is_named(artifact, text):
    error = refused("pca", "--model", "demo", "--data", text, "--output", artifact, *SMALL)
    assert "holds the artifact of another run (model " in error and " there, 'demo' asked for" in error


@pytest.mark.parametrize(("tokens", "few"), [(8, True), (256, False)])
def test_tokens_that_span_no_basis_are_said(tmp_path, tiny_model_folder, text, tokens, few):
    done = refused_or_done(
        "pca", "--model", tiny_model_folder, "--data", text, "--output", tmp_path / "a", "--num-tokens", tokens
    )
    assert done.exit_code == 0 and ("tokens span no basis of 8 dimensions" in done.stderr) == few


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("faiss", ("cluster", "ARTIFACT")),
        ("faiss", ("pca", "--model", "demo", "--data", "stdlib")),
        ("matplotlib", ("pca", "--model", "demo", "--data", "stdlib")),
    ],
)
def test_a_missing_package_is_said_before_the_work(artifact, tmp_path, package, arguments):
    arguments = [str(artifact) if argument == "ARTIFACT" else argument for argument in arguments]
    main = f"import sys; sys.modules[{package!r}] = None; sys.argv[1:] = {arguments!r}"
    run = [sys.executable, "-c", f"{main}; from kvcal.calibrate.__main__ import main; main()"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and line.startswith(f"Error: {package} is not installed, and is needed to ")
    assert "pip install 'kvcal[calibrate]'" in line
    assert not list(tmp_path.iterdir())


def test_an_interrupted_evaluation_without_output_says_that_nothing_was_kept(
    artifact, tiny_model_folder, text, monkeypatch
):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("kvcal.calibrate.evaluation.protocol.evaluate", interrupted)
    options = ("--prefix", 32, "--continuation", 4, "--windows", 1, "--tasks", "perplexity", "--method", "streaming")
    done = refused_or_done("evaluate", artifact, "--data", text, *options)
    assert done.exit_code == 130 and "nothing was kept: with --output FILE the same command goes on" in done.stderr


def test_more_clusters_than_keys(artifact):
    assert "cannot make 5000 clusters" in refused("cluster", artifact, "--clusters", 5000)
    assert "give at most 256" in refused("cluster", artifact, "--metric", "joint", "--clusters", 257)


@pytest.mark.parametrize("command", ["analyze-rank", "cluster", "inspect", "verify"])
def test_commands_on_what_is_not_an_artifact(tmp_path, command):
    (tmp_path / "folder").mkdir()
    assert "folder: not an artifact (no manifest.json)" in refused(command, tmp_path / "folder")
    assert "nowhere: does not exist: make one with" in refused(command, tmp_path / "nowhere")
    assert f"does not exist: did you mean {tmp_path / 'folder'}?" in refused(command, tmp_path / "foldr")


def test_a_damaged_artifact(artifact, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    path = next(copy.glob("pca.*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for command in ("verify", "analyze-rank", "inspect"):
        assert path.name in refused(command, copy)


def test_an_artifact_of_another_model(artifact, tmp_path, tiny_model_folder):
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight += 1
    model.save_pretrained(folder)
    assert "other weights" in refused("verify", artifact, "--model", folder)


def test_diff_of_artifacts_of_different_shapes(artifact, tmp_path):
    from samples import artifact as sample

    from kvcal.artifacts import save

    save(sample(layers=2, head_dim=4), tmp_path / "other")
    assert "cannot be compared" in refused("diff", artifact, tmp_path / "other")


@pytest.mark.parametrize("variance", ["0", "1.5", "-1", "nan", "x"])
def test_variance_out_of_range(artifact, variance):
    refused("analyze-rank", artifact, "--variance", variance)


def test_a_figure_that_cannot_be_written_is_said_before_the_work(artifact, tmp_path):
    assert ".png" in refused("analyze-rank", artifact, "--plot", tmp_path / "figure.pdf")
    assert "not a folder" in refused("cluster", artifact, "--plot", tmp_path / "no" / "figure.png")


def test_a_figure_on_a_folder(artifact, tmp_path):
    (tmp_path / "folder.png").mkdir()
    result = refused_or_done("analyze-rank", artifact, "--plot", tmp_path / "folder.png")
    assert result.exit_code == 2 and result.stderr.startswith("Error: ") and "folder.png" in result.stderr


def test_the_current_folder_as_output(tmp_path, monkeypatch, tiny_model_folder, text):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "is the current folder" in refused(
        "pca", "--model", tiny_model_folder, "--data", text, "--output", ".", *SMALL
    )
    assert list((tmp_path / "here").iterdir()) == []


def test_artifact_and_model_together(artifact, tiny_model_folder):
    assert "not both" in refused("analyze-rank", artifact, "--model", tiny_model_folder, "--data", "stdlib")
    assert "ARTIFACT" in refused("analyze-rank")
    assert "--model" in refused("pca", "--data", "stdlib")


def test_an_unknown_command_names_the_nearest():
    assert "analyze-rank" in refused("analyse-rank")
