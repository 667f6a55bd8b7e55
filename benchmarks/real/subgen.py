"""SubGen's assumption about keys, the errors of its estimates, and what a model then finds among many alike lines."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from decoding import decode
from settings import at_equal_bytes
from subjects import TEXTS, Bench
from torch import Tensor

from kvcal.artifacts import Artifact
from kvcal.calibrate import open_data
from kvcal.calibrate.builtin.recall import dictionary, random_code
from kvcal.calibrate.cla.rotation import rotation_of, unrotate
from kvcal.calibrate.clusterability import clusterability
from kvcal.calibrate.evaluation.prefilled import PREFILLED
from kvcal.calibrate.evaluation.prompts import make_prompts
from kvcal.calibrate.evaluation.standard_errors import mean
from kvcal.calibrate.models import max_context
from kvcal.calibrate.planning.points import Problem

MEMORY = 1 / 5
"""Of all tokens, what the paper's line retrieval keeps."""
SEEDS = range(8)
LINES = (10, 20, 40)
LINE_SAMPLES = 40
COMPARED = ("subgen", "streaming", "h2o")


def at_memory(head_dim: int, length: int) -> list[dict[str, Any]]:
    """Where a fifth of the tokens is held: SubGen with its paper's sums and with ours, and what it is compared with."""
    return [setting for setting in at_equal_bytes(MEMORY, head_dim, length) if setting["method"] in COMPARED]


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
    """Of each setting, in parts of ‖o_dense‖ and with SubGen over SEEDS: "error" of the attention output, root mean
    square; "spread", the root of its variance; "bias", how far the mean of all seeds would be off. Means of layers with
    "…_se" over texts, and "…_by_layer"."""
    rows = []
    for setting in settings:
        by_layer = [_estimates(problem, setting) for problem in problems]
        row: dict[str, Any] = {"setting": dict(setting)}
        for name in by_layer[0]:
            of = torch.stack([layer[name] for layer in by_layer])
            row[name], row[f"{name}_se"] = mean(of.mean(0).tolist())
            row[f"{name}_by_layer"] = [round(each, 4) for each in of.mean(1).tolist()]
        rows.append(row)
        print(f"subgen: {setting}", flush=True)
    return rows


def _estimates(problem: Problem, setting: Mapping[str, Any]) -> dict[str, Tensor]:
    """[B] each: means of heads and steps."""
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
    length = dense.norm(dim=-1)
    found = torch.stack(outputs)
    centre = found.mean(0)
    # The mean of n seeds is itself off by a part of their variance, and n - 1 of them are free.
    variance = (found - centre).square().sum(-1).sum(0) / max(1, len(seeds) - 1)
    bias = ((centre - dense).square().sum(-1) - variance / len(seeds)).clamp_min(0)
    parts = {"error": (found - dense).square().sum(-1).mean(0), "spread": variance, "bias": bias}
    return {name: (part.sqrt() / length).flatten(1).mean(1) for name, part in parts.items()}


def lines(bench: Bench) -> None:
    """Line retrieval: what is registered under one of many names."""
    for count in LINES:
        path = _line_prompts(bench.work / f"lines-{count}.jsonl", count)
        prompts = make_prompts(
            (),
            bench.loaded.tokenizer,
            tasks=(),
            prompt_files=[path],
            match="part",
            max_new_tokens=12,
            chat_template=False,
            most_tokens=max_context(bench.loaded.model.config),
        )
        grid = at_memory(bench.subject.head_dim, prompts.longest_context)
        decode(bench, f"lines-{count}", prompts, grid, None, question=PREFILLED)


def _line_prompts(path: Path, count: int) -> Path:
    words, _ = dictionary(str(text) for text in itertools.islice(open_data(list(TEXTS["prose"])), 200))
    rng = random.Random(count)
    rows = []
    for _ in range(LINE_SAMPLES):
        codes = {name: random_code(rng) for name in rng.sample(words, count)}
        record = [f"line {name}: REGISTER_CONTENT is <{code}>" for name, code in codes.items()]
        # A model of this size answers half as often where it is not shown how.
        shown, asked = rng.sample(list(codes), 2)
        question = f"\n{_asked(shown)}{codes[shown]}>\n\n{_asked(asked)}"
        rows.append({"context": "\n".join(record) + "\n", "question": question, "answer": codes[asked]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _asked(name: str) -> str:
    line = f"line {name}: REGISTER_CONTENT is <"
    return f"Question: what is the REGISTER_CONTENT in line {name}?\nAnswer: {line}"
