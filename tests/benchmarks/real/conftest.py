"""Modules of benchmarks/real."""

from importlib import import_module

import pytest


@pytest.fixture
def module():
    return lambda name: import_module(f"benchmarks.real.{name}")
