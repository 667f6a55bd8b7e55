"""How a sampled choice of `spectral` differs from the exact one: on text that goes on, and where its topic changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvcal.artifacts import Artifact
from kvcal.calibrate import open_data
from kvcal.calibrate.evaluation.prompts import make_prompts
from kvcal.calibrate.evaluation.standard_errors import mean
from kvcal.calibrate.planning.points import Problem, relative_error

from .attention import STEPS, blocks
from .subjects import UNSEEN

Setting = dict[str, Any]
CHOICES: list[Setting] = [
    {"choice": "exact"},
    *({"choice": "sampled", "sample": sample} for sample in (128, 256, 512, 1024)),
]


def rows_of(loaded: Any, kind: str, rows: int, length: int) -> Tensor:
    """[rows, length + STEPS] int64, of which the last STEPS tokens are decoded. kind: "text that goes on", "prose, then
    code", "text, then a question"."""
    if kind == "text that goes on":
        return blocks(loaded, UNSEEN["both"], rows, length + STEPS)
    if kind == "prose, then code":
        prose, code = (
            blocks(loaded, UNSEEN[name], rows, tokens) for name, tokens in (("prose", length), ("code", STEPS))
        )
        return torch.cat((prose, code), 1)
    heldout = open_data(list(UNSEEN["both"]))
    prompts = make_prompts(
        heldout, loaded.tokenizer, prefix=length + STEPS, tasks=("passkey",), episodes=rows, name="unseen text"
    )
    samples = prompts.tasks[0].samples
    return torch.tensor([(sample.context + sample.question)[-length - STEPS :] for sample in samples])


KINDS = ("text that goes on", "prose, then code", "text, then a question")


def choose(found: Sequence[Problem], setting: Setting, artifact: Artifact) -> list[dict[str, Any]]:
    """Of each of CHOICES with an otherwise equal setting, means of layers: "read", tokens over those of the exact
    choice; "most", of one head and step; "mass", the share of the dense attention on what is read; "error". "…_se" of
    each but "most", over texts."""
    layers = [[_layer(problem, {**setting, **choice}, artifact) for choice in CHOICES] for problem in found]
    rows = []
    for at, choice in enumerate(CHOICES):
        tokens, mass, error = (
            torch.stack([layer[at][name] for layer in layers]) for name in ("tokens", "mass", "error")
        )
        exact = torch.stack([layer[0]["tokens"] for layer in layers]).mean((2, 3))
        row: dict[str, Any] = {**choice, "most": float((tokens / exact[..., None, None]).max())}
        for name, by_text in (("read", tokens.mean((2, 3)) / exact), ("mass", mass), ("error", error)):
            row[name], row[f"{name}_se"] = mean(by_text.mean(0).tolist())
        rows.append(row)
    return rows


@torch.no_grad()
def _layer(problem: Problem, setting: Setting, artifact: Artifact) -> dict[str, Tensor]:
    """ "tokens" [B, steps, Hkv] read; [B] of "mass" and "error": means of heads and steps."""
    store, tokens, mass, error = problem.store(setting, artifact), [], [], []
    for query, key, value, weights, dense in problem.steps():
        store.append(key, value)
        out = store.attend(query, problem.spec)
        read = store.read_mask()
        by_head = weights.squeeze(3)
        tokens.append(read.sum(-1).float())
        mass.append((by_head * read.unsqueeze(2)).sum(-1).mean((1, 2)))
        error.append(relative_error(out, dense).mean((1, 2)))
    return {
        "tokens": torch.stack(tokens, 1),
        "mass": torch.stack(mass).mean(0),
        "error": torch.stack(error).mean(0),
    }
