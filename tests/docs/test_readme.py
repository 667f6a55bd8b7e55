"""The README is short and true: its figures are those of the tables, its links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
FIGURE = re.compile(r"(\d+(?:\.\d+)?) ±\s+(\d*\.?\d+)")
"""A value with its standard error: "1.017 ± .006"."""


def test_it_is_read_in_a_few_minutes():
    assert len(README.splitlines()) <= 120


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
