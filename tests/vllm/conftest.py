"""These tests need vLLM, in an environment of its own, and what `prepare.py` has made: `make vllm` sees to both."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

PREPARED = os.environ.get("KVCAL_VLLM_PREPARED", "")
HERE = Path(__file__).parent
collect_ignore_glob = [] if PREPARED and importlib.util.find_spec("vllm") else ["test_*.py"]


@pytest.fixture(scope="session")
def prepared() -> dict[str, Any]:
    return json.loads((Path(PREPARED) / "expected.json").read_text())


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Of a process that reaches nobody and says little."""
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    return {**os.environ, **quiet, "VLLM_CPU_KVCACHE_SPACE": "1"}


class Run:
    """Calls of one engine, in a process of its own: [call][prompt][output]."""

    preempted = 0
    """How often the last engine preempted a request."""

    def __init__(self, folders: pytest.TempPathFactory, environment: dict[str, str]):
        self.folders, self.environment = folders, environment

    def __call__(
        self, model: dict[str, Any], kvcal: dict[str, Any] | None, calls: Sequence[dict[str, Any]], workers: int = 1,
        **engine: Any,
    ) -> list[list[list[dict[str, Any]]]]:  # fmt: skip
        path = self.folders.mktemp("engine") / "asked.json"
        asked = None if kvcal is None else {"artifact": model["artifact"], **kvcal}
        path.write_text(json.dumps({"model": model["model"], "kvcal": asked, "calls": calls, "engine": engine}))
        bound = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # an engine within the process starts sooner
        if workers > 1:
            bound = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(workers)))}
        command = [sys.executable, str(HERE / "engine_process.py"), str(path)]
        done = subprocess.run(command, env={**self.environment, **bound}, capture_output=True, text=True, timeout=900)
        assert not done.returncode, done.stderr[-4000:]
        found = json.loads(path.with_suffix(".out").read_text())
        self.preempted = found["preempted"]
        return found["calls"]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Run:
    return Run(tmp_path_factory, environment)
