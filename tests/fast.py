"""`make check-fast`: the tests that a change needs, the nearest first, as many as begin within `SECONDS`.

Near to a changed module are the test file of its name, then test files that import it, then those of its folder.
What did not begin in time is counted at the end: `make check` runs everything.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
ROOMS = ("artifacts", "kernels", "runtime", "calibrate")
_TESTED_IN = {"src": ("package",), "examples": ("docs",), "benchmarks": ("benchmarks",)}
"""Folder at the root -> that of its tests, which do not mirror it."""
ALWAYS = ("test_arrows.py", "test_docstrings.py")
"""What any change of the product can break, and what takes a moment."""
SECONDS = 25
"""Until no further test begins; importing torch and transformers, and the last test, come on top of it."""


def changed(base: str = "HEAD") -> list[Path]:
    """Files that differ from a commit, new ones included; where there are none, those of the last commit."""
    found = _git("diff", "--name-only", base) + _git("ls-files", "--others", "--exclude-standard")
    return [Path(name) for name in found or _git("diff", "--name-only", "HEAD~1")]


def needed(files: Iterable[Path]) -> list[Path]:
    """Test files for changed files, paths from the root of the repository; the nearest first."""
    ranks: dict[Path, int] = {TESTS / name: 0 for name in ALWAYS}

    def add(found: Iterable[Path], rank: int) -> None:
        for path in found:
            ranks[path] = min(rank, ranks.get(path, rank))

    for file in files:
        if file.suffix == ".md" or file.name == "mkdocs.yml":
            add((TESTS / "docs").glob("test_*.py"), 0)
        elif file.parts[0] in ("src", "examples", "benchmarks") or file.name == "pyproject.toml":
            add(TESTS.joinpath(*_TESTED_IN.get(file.parts[0], ("package",))).rglob("test_*.py"), 1)
        elif file.suffix != ".py" and file.parts[0] in ROOMS:
            add(TESTS.joinpath(*file.parts[:-1]).glob("test_*.py"), 1)
        elif file.suffix != ".py":
            continue
        elif file.parts[0] == "tests":
            here = [ROOT / file] if file.name.startswith("test_") else _importers(file.stem)
            add((path for path in here if path.exists()), 0)
        elif file.parts[0] in ROOMS:
            add(TESTS.joinpath(*file.parts[:-1]).glob(f"test_{file.stem}*.py"), 0)
            add(_importers(f"kvcal.{'.'.join(file.with_suffix('').parts).removesuffix('.__init__')}"), 1)
            add(TESTS.joinpath(*file.parts[:-1]).glob("test_*.py"), 2)
    return sorted(ranks, key=lambda path: (ranks[path], path))


def _importers(module: str) -> list[Path]:
    """Test files that import a module, themselves or through helpers of the tests."""
    wanted, found = {module}, set()
    while True:
        more = {path for path in _test_modules() if path not in found and _imports(path) & wanted}
        if not more:
            return [path for path in found if path.name.startswith("test_")]
        found |= more
        wanted |= {path.stem for path in more if not path.name.startswith("test_")}


@cache
def _test_modules() -> tuple[Path, ...]:
    return tuple(TESTS.rglob("*.py"))


@cache
def _imports(path: Path) -> frozenset[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def _git(*arguments: str) -> list[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")[
        :-1
    ]


class Clock:
    """Lets no test begin when the time is over."""

    def __init__(self) -> None:
        self.end, self.left_out = time.monotonic() + SECONDS, 0

    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if time.monotonic() < self.end:
            return None
        self.left_out += 1
        return True

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.left_out:
            terminalreporter.write_line(f"{self.left_out} tests did not begin within {SECONDS} s: make check runs all")


if __name__ == "__main__":
    files = changed(*sys.argv[1:])
    sys.exit(pytest.main(["-q", "-x", "-m", "not slow and not real", *map(str, needed(files))], plugins=[Clock()]))
