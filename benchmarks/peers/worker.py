"""Measure kvpress's presses on token ids; `python -m benchmarks.peers` starts it in an environment of its own.

    .venv-peers/bin/python benchmarks/peers/worker.py JOB.safetensors MEASURED.json

Knows nothing of kvcal. The protocol is that of `calibrate evaluate`: the prefix is prefilled under the press in one
call, then the continuation, or a question and greedily its answer, is fed token by token through what is left of the
cache, each token at its true position.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

Hooks = Callable[[Any], AbstractContextManager[None]]
"""A press: `with press(model): …`."""


@dataclass(frozen=True)
class Batch:
    """Rows of one task and one prefix length."""

    key: str
    prefixes: Tensor
    """[B, P] int64."""
    continuations: Tensor | None
    """[B, C] int64, of text."""
    questions: list[list[int]]
    """Token ids by row; [] for text."""
    new_tokens: int
    """Of an answer."""
    ends: frozenset[int]
    """Tokens that end an answer."""


@dataclass(frozen=True)
class Peer:
    """A press as one row of the results."""

    setting: dict[str, Any]
    presses: Callable[[int], tuple[Hooks, Hooks]]
    """Tokens of the prefix -> what is entered for the prefill, and for the steps."""


def nothing(model: Any) -> AbstractContextManager[None]:
    return nullcontext()


FULL = Peer({"method": "full"}, lambda prefix: (nothing, nothing))


def peers(keeps: list[float]) -> list[Peer]:
    """Every press at every cache size, a fraction of the prefix's tokens."""
    import kvpress

    def prefill_only(kind: Callable[..., Hooks], **options: Any) -> Callable[[float], Callable[..., Any]]:
        return lambda keep: lambda prefix: (kind(compression_ratio=1 - keep, **options), nothing)

    # The score needs the queries of several steps, hence an interval; until it is over nothing would be pruned and
    # a short question be answered from the whole prefix, hence the same press for the prefix. With KnormPress, which
    # can prune at every step, this model does far worse.
    def decoding(keep: float) -> Callable[..., Any]:
        def both(prefix: int) -> tuple[Hooks, Hooks]:
            base = kvpress.ExpectedAttentionPress
            size = max(1, int(keep * prefix))
            steps = kvpress.DecodingPress(base(), compression_interval=16, target_size=size)
            press = kvpress.PrefillDecodingPress(base(1 - keep), steps)
            return press, press

        return both

    # SnapKV's default window of 64 would be all that the smallest cache of a prefix of 1024 tokens holds.
    kinds: dict[str, tuple[dict[str, Any], Callable[[float], Callable[..., Any]]]] = {
        "kvpress-snapkv": ({"window": 32}, prefill_only(kvpress.SnapKVPress, window_size=32)),
        "kvpress-streaming": ({"sinks": 4}, prefill_only(kvpress.StreamingLLMPress, n_sink=4)),
        "kvpress-expected-attention": ({}, prefill_only(kvpress.ExpectedAttentionPress)),
        "kvpress-decoding": ({"base": "expected-attention", "interval": 16}, decoding),
    }
    return [
        Peer({"method": name, "keep": keep, **options}, presses(keep))
        for name, (options, presses) in kinds.items()
        for keep in keeps
    ]


def read_job(path: Path) -> tuple[dict[str, Any], list[Batch]]:
    """The job's settings and its batches, as `benchmarks.peers` wrote them."""
    with safe_open(path, "pt") as file:
        job = json.loads(file.metadata()["job"])
        names = set(file.keys())
        batches = []
        for key in job["batches"]:
            text = file.get_tensor(f"{key}/continuations") if f"{key}/continuations" in names else None
            asked = job["asked"].get(key, {"questions": [], "new_tokens": 0})
            prefixes, ends = file.get_tensor(f"{key}/prefixes"), frozenset(job["ends"])
            batches.append(Batch(key, prefixes, text, asked["questions"], asked["new_tokens"], ends))
    return job, batches


@torch.no_grad()
def measure(model: Any, batch: Batch, peer: Peer) -> dict[str, Any]:
    """One press on one batch: {"nll" of each row of text, "answers": token ids of each, costs}."""
    from transformers import DynamicCache

    prefix = batch.prefixes.shape[1]
    while_prefilling, while_decoding = peer.presses(prefix)
    cache = DynamicCache(config=model.config)
    read: list[int] = []
    ms: list[float] = []

    def step(fed: Tensor) -> Tensor:
        # Attention reads what was there and the new token, whatever the press removes afterwards.
        read.append(sum(held.nbytes + held[:, :, :1].nbytes for held in held_by(cache)))
        at = torch.full_like(fed, prefix + len(read) - 1)
        started = time.perf_counter()
        out = model(fed, past_key_values=cache, position_ids=at, use_cache=True)
        ms.append(1000 * (time.perf_counter() - started))
        return out.logits[:, -1]

    with while_prefilling(model):
        logits = model(batch.prefixes, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    with while_decoding(model):
        if batch.continuations is not None:
            nll, answers = read_text(step, logits, batch.continuations), []
        else:
            nll, answers = [], answer(step, batch)
    costs = {"resident_bytes": sum(held.nbytes for held in held_by(cache)), "bytes_read": read, "ms": ms}
    return {"rows": len(batch.prefixes), "nll": nll, "answers": answers, **costs}


def read_text(step: Callable[[Tensor], Tensor], logits: Tensor, continuations: Tensor) -> list[float]:
    nll = []
    for position in range(continuations.shape[1]):
        if position:
            logits = step(continuations[:, position - 1 : position])
        token = continuations[:, position : position + 1]
        nll.append(-logits.double().log_softmax(-1).gather(1, token))
    summed: list[float] = torch.cat(nll, 1).sum(1).tolist()
    return summed


def answer(step: Callable[[Tensor], Tensor], batch: Batch) -> list[list[int]]:
    """A row whose question is shorter begins to answer while others are still being asked."""
    said: list[list[int]] = [[] for _ in batch.questions]
    fed = [question[0] for question in batch.questions]
    done = [False] * len(said)
    at = 0
    while not all(done):
        likeliest = step(torch.tensor(fed).unsqueeze(1)).argmax(-1).tolist()
        at += 1
        for row, question in enumerate(batch.questions):
            if at < len(question):
                fed[row] = question[at]
            elif not done[row]:
                fed[row] = likeliest[row]
                if fed[row] not in batch.ends:
                    said[row].append(fed[row])
                done[row] = fed[row] in batch.ends or len(said[row]) == batch.new_tokens
    return said


def held_by(cache: Any) -> list[Tensor]:
    """Keys and values [B, Hkv, tokens, D] of all layers."""
    return [held for layer in cache.layers for held in (layer.keys, layer.values)]


def main() -> None:
    from importlib.metadata import version

    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    job, batches = read_job(Path(sys.argv[1]))
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(
        job["model_folder"], dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    work = [FULL, *peers(job["keeps"])]
    rows = []
    for number, peer in enumerate(work, 1):
        print(f"{number}/{len(work)} {json.dumps(peer.setting)}", file=sys.stderr, flush=True)
        rows.append({"setting": peer.setting, "measured": {b.key: measure(model, b, peer) for b in batches}})
    versions = {name: version(name) for name in ("kvpress", "torch", "transformers")}
    Path(sys.argv[2]).write_text(json.dumps({"versions": versions, "rows": rows}), encoding="utf-8")


if __name__ == "__main__":
    main()
