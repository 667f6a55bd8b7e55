"""The site is built without a warning, and every command, option, setting and public name has its place in it."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from importlib import import_module

import click
import pytest
from pages import DOCS, ROOT

import kvcal
import kvcal.calibrate
import kvcal.runtime
import kvcal.runtime.cla
import kvcal.runtime.integration
from kvcal.calibrate.cli import cli
from kvcal.calibrate.cli.group import COMMANDS
from kvcal.runtime.cla.method import Cla
from kvcal.runtime.methods import METHODS

PACKAGES = [kvcal, kvcal.artifacts, kvcal.runtime, kvcal.runtime.cla, kvcal.runtime.integration, kvcal.calibrate]
BY_NAME = {"METHODS", "QUANTITIES", "SCHEMA_VERSION", "__version__"}
"""Values, which a page names where they belong."""
ROOMS = {"artifacts", "calibrate", "kernels", "runtime"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_every_option_of_every_command_is_on_the_page(site):
    page = (site / "commands.html").read_text()
    context = click.Context(cli, info_name="calibrate")
    for name in COMMANDS:
        assert re.search(rf'id="(calibrate-)?{name}[^"]*"', page), name
        for parameter in cli.get_command(context, name).params:
            for option in parameter.opts:
                if option.startswith("--") and not getattr(parameter, "hidden", False):
                    assert option in page, (name, option)


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site):
    for path in site.rglob("*.html"):
        assert not re.search(r'<(script|img|iframe)[^>]*\ssrc="(https?:)?//', path.read_text()), path
        assert not re.search(r'<link[^>]*rel="stylesheet"[^>]*href="(https?:)?//', path.read_text()), path


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_public_name_is_documented(package):
    pages = "\n".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    shown = [target.rpartition(".") for target in re.findall(r"^::: ([\w.]+)", pages, re.MULTILINE)]
    documented = {getattr(import_module(module), name) for module, _, name in shown}
    for name in set(package.__all__) - ROOMS:
        if name in BY_NAME:
            assert name in pages, name
        else:
            assert getattr(package, name) in documented, f"{package.__name__}.{name}"
            assert getattr(package, name).__doc__, name


def test_every_setting_of_every_method_is_documented():
    page = (DOCS / "api" / "methods.md").read_text()
    for name, kind in {**METHODS, "cla": Cla}.items():
        fields = ", ".join(field.name for field in dataclasses.fields(kind))
        target = f"::: {kind.__module__}.{kind.__qualname__}\n"
        (section,) = re.findall(rf"^## {name}\n\n{re.escape(target)}(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
        assert section.count(f"members: [{fields}]") == 2, name
