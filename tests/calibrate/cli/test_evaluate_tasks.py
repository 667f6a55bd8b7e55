"""What `calibrate evaluate` says of tasks and prompts before it opens anything."""

import json

import pytest
from click.testing import CliRunner

from kvcal.calibrate.cli import cli


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["--tasks", "nope"],
            "no task 'nope': choose among perplexity, passkey, multikey, ruler (all of niah_single_1, ",
        ),
        (["--tasks", "passkey,niah_single"], "no task 'niah_single': choose among"),
        (["--tasks", ","], "no tasks: choose among"),
        ([], "give --data"),
        (["--tasks", "passkey"], "give --data"),
        (["--prompts", "mine.jsonl", "--tasks", "perplexity"], "give --data"),
        (["--prompts", "mine.jsonl"], "absent: does not exist"),
        (["--prompts", "mine.json"], "mine.json: does not exist: did you mean mine.jsonl?"),
        (["--prompts", "bad.jsonl"], "bad.jsonl: row 1: no context"),
        (
            ["--prompts", "mine.jsonl", "--prompts", "sub/mine.jsonl"],
            "sub/mine.jsonl: its results would be named 'mine'",
        ),
        (["--prompts", "mine.jsonl", "--lengths", "many"], "--lengths"),
        (["--prompts", "mine.jsonl", "--lengths", "9" * 5000], "--lengths"),
        (["--prompts", "mine.jsonl", "--match", "half"], "'half' is not one of 'exact', 'part'"),
    ],
)
def test_tasks_and_prompts_are_checked_first(tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    row = {"context": "a", "question": "b", "answer": "c"}
    (tmp_path / "sub").mkdir()
    for name, body in (("mine", row), ("sub/mine", row), ("bad", {"question": "b", "answer": "c"})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(body))
    result = CliRunner().invoke(cli, ["evaluate", "absent", *given])
    assert result.exit_code == 2 and message in result.stderr.replace("\n", " "), result.output
