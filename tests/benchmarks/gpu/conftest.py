"""Modules of benchmarks/gpu."""

from importlib import import_module

import pytest


@pytest.fixture
def module():
    return lambda name: import_module(f"benchmarks.gpu.{name}")
