"""Imported first, it makes `kvcal` this tree's folders, installed or not: a namespace in memory, nothing is written."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

if "kvcal" not in sys.modules:
    spec = ModuleSpec("kvcal", None, is_package=True)
    spec.submodule_search_locations = [str(ROOT)]
    sys.modules["kvcal"] = module_from_spec(spec)
