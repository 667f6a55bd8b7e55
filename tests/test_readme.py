"""The README is true: its commands exist, its Python runs."""

import re
from pathlib import Path

import pytest

from kvcal.artifacts import load
from kvcal.calibrate.cli.group import COMMANDS

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_documented(command):
    assert f"`calibrate {command}`" in README


def test_no_placeholder_is_left():
    assert not re.search(r"@[A-Z]+@", README)


def test_files_that_it_points_to_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (Path(__file__).parent.parent / target).exists(), target


def test_the_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["cache"].bytes_read() > 0 and (tmp_path / "prompt" / "cache.safetensors").exists()
    assert load(tmp_path / "demo-stdlib").model.id == "demo"
