"""The models, the texts and the artifacts of the measurements."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kvcal.artifacts import Artifact
from kvcal.calibrate import load_model
from kvcal.runtime import load

_BOOKS = ("debian-handbook", "anarchism")
_KINDS = {"prose": _BOOKS, "code": ("stdlib",), "both": (*_BOOKS, "stdlib")}
TEXTS = {kind: tuple(f"{name}:train" for name in names) for kind, names in _KINDS.items()}
"""What is calibrated on, equal parts of each."""
UNSEEN = {kind: tuple(f"{name}:heldout" for name in names) for kind, names in _KINDS.items()}
"""What is evaluated on."""
TOKENS = 131072
"""Calibrated on, where nothing else is said."""


@dataclass(frozen=True)
class Subject:
    """A model, and how much is measured on it."""

    model: str
    head_dim: int
    lengths: dict[int, tuple[str, ...]]
    """Tokens of a prefix -> the levels of bytes that every method is measured at."""
    sizes: tuple[int, ...]
    """Tokens calibrated on, to see from where on ranks and errors stand still."""
    seq_len: int = 2048


SUBJECTS = {
    "smollm2-135m": Subject(
        "smollm2-135m",
        64,
        {2048: ("1/32", "1/16", "1/8", "1/4", "1/2"), 4096: ("1/16", "1/8", "1/4"), 7680: ("1/16", "1/8", "1/4")},
        (8192, 32768, 131072, 524288),
    ),
    "gemma-3-270m": Subject("gemma-3-270m", 256, {16384: ("1/16", "1/8", "1/4")}, (TOKENS,)),
}


@dataclass(frozen=True)
class Bench:
    """A subject, the folder of its artifacts, and the folder of its results."""

    subject: Subject
    work: Path
    results: Path

    @cached_property
    def loaded(self) -> Any:
        return load_model(self.subject.model, device="cpu", dtype="float32")

    def artifact(self, text: str = "both", tokens: int = TOKENS, source: tuple[str, ...] | None = None) -> Artifact:
        """That of `calibrate pca`, calibrated where it is not there yet."""
        folder = self.work / f"{self.subject.model}-{text}-{tokens}"
        arguments = ["pca", "--model", self.subject.model, "--num-tokens", str(tokens), "--resume"]
        arguments += ["--seq-len", str(self.subject.seq_len), "--output", str(folder)]
        for spec in source or TEXTS[text]:
            arguments += ["--data", spec]
        if not folder.exists():
            print("calibrate", shlex.join(arguments), flush=True)
            subprocess.run([sys.executable, "-m", "kvcal.calibrate", *arguments], check=True)
        return load(folder)

    def path(self, part: str) -> Path:
        return self.results / f"{self.subject.model}-{part}.json"
