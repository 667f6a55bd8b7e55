"""SubGen's assumption about keys, the errors of its estimates, and what a model then finds among many alike lines."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcal.artifacts import Artifact
from kvcal.calibrate import open_data
from kvcal.calibrate.builtin.recall import dictionary, fact, question, random_code
from kvcal.calibrate.cla.rotation import rotation_of, unrotate
from kvcal.calibrate.clusterability import clusterability
from kvcal.calibrate.evaluation.prefilled import PREFILLED
from kvcal.calibrate.evaluation.prompts import make_prompts
from kvcal.calibrate.evaluation.standard_errors import mean
from kvcal.calibrate.models import max_context
from kvcal.calibrate.planning.points import Problem
from kvcal.runtime.methods.subgen import SubGen

from .decoding import decode, text_and_passkey
from .settings import at_equal_bytes
from .subjects import TEXTS, Bench

MEMORY = 1 / 5
"""Of all tokens, what the paper's line retrieval keeps."""
WINDOWS = (1 / 4, 3 / 4, 7 / 8)
"""Shares of what is held; a half is what all tables have."""
SEEDS = range(4)
SINKS = SubGen.sinks
LINES = (10, 20, 40)
LINE_SAMPLES = 40
COMPARED = ("subgen", "streaming", "h2o")


def at_memory(head_dim: int, length: int) -> list[dict[str, Any]]:
    """Where a fifth of the tokens is held: SubGen with its paper's sums and with ours, and what it is compared with."""
    return [setting for setting in at_equal_bytes(MEMORY, head_dim, length) if setting["method"] in COMPARED]


def splits(length: int) -> list[dict[str, Any]]:
    """The same memory otherwise divided between SubGen's window and its samples, with our sums."""
    held = round(MEMORY * length)
    windows = [round(share * held) for share in WINDOWS]
    return [{"method": "subgen", "window": window, "s": held - window, "normaliser": "values"} for window in windows]


@torch.no_grad()
def clusterable(artifact: Artifact, model: Any) -> dict[str, list[dict[str, Any]]]:
    """Before and after the rotary embedding, of each layer, means of KV heads: "counts" of greedy centers, the "radius"
    that so many balls need, over that of one ball, and "delta_r", the exponent of the paper's bound."""
    rotation = rotation_of(artifact, model)
    assert rotation is not None
    found: dict[str, list[dict[str, Any]]] = {"post": [], "pre": []}
    for layer in artifact.layers:
        if layer.window is not None:
            continue
        keys, queries = (artifact.tensor("reservoir", layer.index, name).float() for name in ("key_post", "query_post"))
        stages = {"post": (keys, queries), "pre": (unrotate(keys, rotation), unrotate(queries, rotation))}
        for stage, (key, query) in stages.items():
            curve = clusterability(key, query)
            radius, delta_r = curve.radius.double(), curve.delta_r(layer.scaling)
            found[stage].append(
                {
                    "layer": layer.index,
                    "tokens": key.shape[1],
                    "counts": curve.counts.tolist(),
                    "radius": (radius / radius[:, :1]).mean(0).tolist(),
                    "delta_r": delta_r.mean(0).tolist(),
                    "delta_r_least": delta_r.amin(0).tolist(),
                }
            )
    return found


@torch.no_grad()
def estimates(problems: Sequence[Problem], settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each setting, in parts of ‖o_dense‖ and with SubGen over SEEDS: "error" of the attention output; "spread" of
    the draws; "bias", how far the mean of all draws would be off. Root mean squares over heads, steps and texts, by
    layer, and means of layers with "…_se" over texts."""
    rows = []
    for setting in settings:
        by_layer = [_squares(problem, setting) for problem in problems]
        row: dict[str, Any] = {"setting": dict(setting), "layers": [problem.layer for problem in problems]}
        for name in by_layer[0]:
            found = torch.stack([layer[name] for layer in by_layer]).clamp_min(0)
            row[name], row[f"{name}_se"] = mean(found.sqrt().mean(0).tolist())
            row[f"{name}_by_layer"] = [round(each, 4) for each in found.mean(1).sqrt().tolist()]
        rows.append(row)
        print(f"subgen: {setting}", flush=True)
    return rows


def _squares(problem: Problem, setting: Mapping[str, Any]) -> dict[str, Tensor]:
    """[B] each, over ‖o_dense‖², means of heads and steps: of the error, of the spread of draws, and of the bias, which
    an estimate without one may have negative."""
    seeds = SEEDS if setting["method"] == "subgen" else range(1)
    decoded = problem.decoded()
    dense = torch.cat([step[3] for step in decoded], 2)
    outputs = []
    for seed in seeds:
        store = problem.store({**setting, "seed": seed} if len(seeds) > 1 else setting, None)
        steps = []
        for query, key, value, _ in decoded:
            store.append(key, value)
            steps.append(store.attend(query, problem.spec).float())
        outputs.append(torch.cat(steps, 2))
    return squares(torch.stack(outputs), dense)


def squares(draws: Tensor, dense: Tensor) -> dict[str, Tensor]:
    """
    Args:
        draws: [N, B, …, D] of one estimate; dense: [B, …, D], what it is an estimate of.
    """
    centre, count = draws.mean(0), len(draws)
    # The mean of N draws is itself off by an N-th of their variance.
    variance = (draws - centre).square().sum(-1).sum(0) / max(1, count - 1)
    found = {
        "error": (draws - dense).square().sum(-1).mean(0),
        "spread": variance,
        "bias": (centre - dense).square().sum(-1) - variance / count,
    }
    length = dense.square().sum(-1)
    return {name: (part / length).flatten(1).mean(1) for name, part in found.items()}


@torch.no_grad()
def outside(problems: Sequence[Problem], length: int) -> list[dict[str, Any]]:
    """Of each layer, between the first SINKS tokens and a window of a fifth of them: "mass", their share of the
    attention, and "values", the mean length of their values by attention, over that without; "…_se" over texts."""
    rows = []
    for problem in problems:
        size = problem.value.float().norm(dim=-1)  # [B, Hkv, T]
        mass, values = [], []
        for *_, weights, _ in problem.steps():
            between = slice(SINKS, weights.shape[-1] - round(MEMORY * length))
            received, sizes = weights.float().mean(2)[:, :, 0, between], size[:, :, between]
            mass.append(received.sum(-1).mean(1))
            values.append(((received * sizes).sum(-1) / received.sum(-1) / sizes.mean(-1)).mean(1))
        row: dict[str, Any] = {"layer": problem.layer}
        for name, found in (("mass", mass), ("values", values)):
            row[name], row[f"{name}_se"] = mean(torch.stack(found).mean(0).tolist())
        rows.append(row)
    return rows


def splits_decoded(bench: Bench) -> None:
    """A window of three quarters of what is held, beside one of a half and a window alone: perplexity and passkey."""
    length = bench.subject.shortest
    grid = [setting for setting in at_memory(bench.subject.head_dim, length) if setting.get("normaliser") != "clusters"]
    grid = [setting for setting in grid if setting["method"] != "h2o"] + [splits(length)[1]]
    decode(bench, f"subgen-{length}", text_and_passkey(bench), grid, None, full_of=f"methods-{length}")


def line_retrieval(bench: Bench) -> None:
    """The code of one of many words, asked when all are read."""
    for count in LINES:
        prompts = make_prompts(
            (),
            bench.loaded.tokenizer,
            tasks=(),
            prompt_files=[_line_prompts(bench.work / f"lines-{count}.jsonl", count)],
            match="part",
            max_new_tokens=8,
            chat_template=False,
            most_tokens=max_context(bench.loaded.model.config),
        )
        grid = at_memory(bench.subject.head_dim, prompts.longest_context)
        decode(bench, f"lines-{count}", prompts, grid, None, question=PREFILLED)


def _line_prompts(path: Path, count: int) -> Path:
    """Three lines and a question about them come first, answered: a small model has to be shown what is asked for."""
    words, _ = dictionary(str(text) for text in itertools.islice(open_data(list(TEXTS["prose"])), 200))
    rng = random.Random(count)
    rows = []
    for _ in range(LINE_SAMPLES):
        codes = {word: random_code(rng) for word in rng.sample(words, 3 + count)}
        shown, asked = list(codes)[:3], list(codes)[3:]
        example = f"{_record(codes, shown)}{question(shown[1])} {codes[shown[1]]}.\n\n"
        word = rng.choice(asked)
        rows.append({"context": example + _record(codes, asked), "question": question(word), "answer": codes[word]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _record(codes: Mapping[str, str], words: Sequence[str]) -> str:
    return "".join(fact(word, codes[word]).lstrip() for word in words)
