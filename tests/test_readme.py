"""The README is true: its commands exist, its Python runs, its figures are those of the tables."""

import re
from pathlib import Path

import pytest

from kvcal.artifacts import load
from kvcal.calibrate.cli.group import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FIGURE = re.compile(r"(\d+(?:\.\d+)?) ±\s+(\d*\.?\d+)")
"""A value with its standard error: "1.017 ± .006"."""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_documented(command):
    assert f"`calibrate {command}`" in README


def test_no_placeholder_is_left():
    assert not re.search(r"@[A-Z]+@", README)


def test_files_that_it_points_to_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("page", ["README.md", "docs/methods.md"])
def test_figures_are_those_of_the_tables(page):
    """As rounded there, or shorter."""
    tables = [line for line in (ROOT / "docs/results/real.md").read_text().splitlines() if line.startswith("|")]
    known = [tuple(map(float, found)) for found in FIGURE.findall("\n".join(tables))]
    stated = FIGURE.findall((ROOT / page).read_text())
    assert stated
    for figure in stated:
        assert any(all(map(_rounds_to, entry, figure)) for entry in known), " ± ".join(figure)


def _rounds_to(number, shown):
    """Whether "1.44", "2400" or "1.436" is what a number of three decimals is rounded to."""
    decimals = len(shown.partition(".")[2]) if "." in shown else len(shown.rstrip("0")) - len(shown)
    return abs(float(shown) - number) <= (1e-9 if decimals >= 3 else 0.5 * 10**-decimals + 0.0005)


def test_the_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["cache"].bytes_read() > 0 and (tmp_path / "prompt" / "cache.safetensors").exists()
    assert load(tmp_path / "demo-stdlib").model.id == "demo"
