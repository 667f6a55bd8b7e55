"""These tests need vLLM, in an environment of its own, and what `prepare.py` has made: `make vllm` sees to both."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

PREPARED = os.environ.get("KVCAL_VLLM_PREPARED", "")
HERE = Path(__file__).parent
OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
collect_ignore_glob = [] if PREPARED and importlib.util.find_spec("vllm") else ["test_*.py"]

Run = Callable[..., list[list[list[dict[str, Any]]]]]


@pytest.fixture(scope="session")
def prepared() -> dict[str, Any]:
    return json.loads((Path(PREPARED) / "expected.json").read_text())


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Calls of one engine: [call][prompt][output]."""

    def run(
        model: dict[str, Any], kvcal: dict[str, Any] | None, calls: Sequence[dict[str, Any]], **engine: Any
    ) -> list[list[list[dict[str, Any]]]]:
        path = tmp_path_factory.mktemp("engine") / "asked.json"
        asked = None if kvcal is None else {"artifact": model["artifact"], **kvcal}
        path.write_text(json.dumps({"model": model["model"], "kvcal": asked, "calls": calls, "engine": engine}))
        command = [sys.executable, str(HERE / "engine_process.py"), str(path)]
        done = subprocess.run(command, env={**os.environ, **OFFLINE}, capture_output=True, text=True, timeout=600)
        assert not done.returncode, done.stderr[-4000:]
        return json.loads(path.with_suffix(".out").read_text())

    return run
