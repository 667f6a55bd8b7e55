"""Arguments are documented in one form: a line that says so, then those that need a word, by their names. And variables
have names of things."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("artifacts", "kernels", "runtime", "calibrate", "benchmarks", "tests", "examples")
PRODUCT = ("artifacts", "kernels", "runtime", "calibrate")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
ENTRY = re.compile(r"^    (\*{0,2}\w+(?:, \*{0,2}\w+)*): ", re.MULTILINE)


def documented(tree):
    """(function, its docstring)"""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            yield node, ast.get_docstring(node) or ""


def parameters(function):
    if isinstance(function, ast.ClassDef):
        init = [each for each in function.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
        fields = {each.target.id for each in function.body if isinstance(each, ast.AnnAssign)}
        return parameters(init[0]) if init else fields
    of = getattr(function, "args", None)
    if of is None:
        return set()
    return {each.arg for each in (*of.posonlyargs, *of.args, *of.kwonlyargs, of.vararg, of.kwarg) if each is not None}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arguments_have_one_form(path):
    for node, text in documented(ast.parse(path.read_text())):
        place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"
        assert not re.search(r"Args:[^\n]|[^\n ] *Args:", text), f"{place}: let `Args:` have a line of its own"
        if "Args:\n" not in text:
            continue
        section = re.split(r"\n(?=\S)", text.partition("Args:\n")[2])[0]
        entries = ENTRY.findall(section)
        assert entries, f"{place}: no entry `name: …` under Args"
        unknown = {name.lstrip("*") for entry in entries for name in entry.split(", ")} - parameters(node)
        assert not unknown, f"{place}: no parameters {unknown}"


@pytest.mark.parametrize("folder", PRODUCT)
def test_no_variable_is_called_of(folder):
    """Which says nothing of what it is, and cannot be searched for."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.id if isinstance(node, ast.Name) else node.arg if isinstance(node, ast.arg) else ""
            assert name != "of", f"{path.relative_to(ROOT)}:{node.lineno}: name the thing"
