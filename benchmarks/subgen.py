"""SubGen's memory and error on made keys and on the demo model's own: docs/results/subgen.json, .md and -memory.png.

python benchmarks/subgen.py     # about 6 minutes on one thread
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import subgen_error as error
import torch
from measure import machine
from subgen_alternatives import alternatives
from subgen_page import page
from torch import Tensor

from kvcal.artifacts import Artifact
from kvcal.calibrate import calibrate
from kvcal.calibrate.blocks import make_blocks
from kvcal.calibrate.capture import LayerTensors, capture
from kvcal.calibrate.cluster_stage import cluster
from kvcal.calibrate.clusterability import clusterability
from kvcal.calibrate.data import open_data
from kvcal.calibrate.models import load_model
from kvcal.calibrate.plots import png, two_panels
from kvcal.runtime import load
from kvcal.runtime.methods.subgen import SubGen
from kvcal.runtime.settings import new_store

FOLDER = Path(__file__).parent.parent / "docs" / "results"
BLOCK, BLOCKS, MEASURED = 4096, 16, 4
"""Tokens per block of held-out text; blocks for the memory curve; and of these, for errors."""
LENGTHS = [1024 * 2**power for power in range(7)]
APART = 16384
"""The longest row where every key may open a cluster."""
DIM, LUMPS = 64, 64
NEAR = 0.75
"""Delta without a cap, of the model's keys: so much of the radius that 64 clusters need."""
BUDGETS = {
    "1/16": SubGen(window=64, clusters=32, t=2, s=140, normaliser="clusters"),
    "1/8": error.DEFAULT,
    "1/4": SubGen(window=256, clusters=128, t=4, s=444, normaliser="clusters"),
}

Layer = tuple[int, Tensor, Tensor, Tensor, float]
"""Index, query, key, value [1, H, tokens, D], scaling."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", help="of the demo model, with the stage clusters; made when not given")
    torch.set_num_threads(1)
    artifact = demo_artifact(parser.parse_args().artifact)
    layers = captured_layers()
    found: dict[str, Any] = {"machine": machine(), "memory": memory(layers)}
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "subgen-memory.png").write_bytes(figure(found["memory"]))
    blocks = [error.Captured.of(*layer) for layer in split(layers)]
    found["text"] = {"data": "stdlib", "split": "heldout", "blocks": MEASURED, "tokens": BLOCK, "steps": error.STEPS}
    found["ablations"] = error.ablations(blocks, artifact)
    found["budgets"] = {name: dataclasses.asdict(settings) for name, settings in BUDGETS.items()}
    found["alternatives"] = alternatives(blocks, artifact, BUDGETS)
    found["bound"] = error.against_the_bound(blocks, artifact)
    found["cost"] = error.cost(blocks, artifact)
    (FOLDER / "subgen.json").write_text(json.dumps(found, indent=1) + "\n")
    (FOLDER / "subgen.md").write_text(page(found))


def demo_artifact(folder: str | None) -> Artifact:
    if folder is not None:
        return load(folder)
    loaded = load_model("demo")
    blocks = make_blocks(open_data("stdlib", "train"), loaded.tokenizer, 131072, 2048)
    return cluster(calibrate(loaded.model, blocks))


def captured_layers() -> list[Layer]:
    """Of held-out text; each block starts at position 0."""
    loaded = load_model("demo")
    blocks = make_blocks(open_data("stdlib", "heldout"), loaded.tokenizer, BLOCK * BLOCKS, BLOCK)
    parts: dict[int, list[LayerTensors]] = {}

    def observe(tensors: LayerTensors) -> None:
        parts.setdefault(tensors.layer, []).append(tensors)

    with torch.no_grad(), capture(loaded.model, observe):
        for ids in blocks.ids[blocks.attended.all(1)]:
            loaded.model(ids.unsqueeze(0).long())
    return [
        (
            layer,
            *(torch.cat([getattr(part, name) for part in of], 2) for name in ("query_post", "key_post", "value")),
            of[0].scaling,
        )
        for layer, of in sorted(parts.items())
    ]


def split(
    layers: Sequence[tuple[int, Tensor, Tensor, Tensor, float]],
) -> list[tuple[int, Tensor, Tensor, Tensor, float]]:
    """The first blocks by themselves."""
    return [
        (layer, *(of[:, :, start : start + BLOCK] for of in (query, key, value)), scaling)
        for start in range(0, MEASURED * BLOCK, BLOCK)
        for layer, query, key, value, scaling in layers
    ]


def memory(layers: Sequence[Layer]) -> dict[str, Any]:
    """Bytes held and clusters, means per KV head, against tokens: with the default cap, and without one."""
    generator = torch.Generator().manual_seed(0)
    tokens = LENGTHS[-1]
    value = torch.randn(1, 1, tokens, DIM, generator=generator)
    centre = torch.randn(LUMPS, DIM, generator=generator)
    which = torch.randint(LUMPS, (tokens,), generator=generator)
    gaussian = torch.randn(1, 1, tokens, DIM, generator=generator)
    lumps = centre[which] + 0.25 * torch.randn(1, 1, tokens, DIM, generator=generator)
    kinds: dict[str, list[tuple[Tensor, Tensor, float]]] = {
        # Members of a lump are about 0.25 √(2 D) = 2.8 from one another, lumps √(2 D) = 11.
        "lumps": [(lumps, value, 5.0)],
        "gaussian": [(gaussian, value, 5.0)],
        "demo": [
            (key[:, [head]], value[:, [head]], NEAR * radius(key[:, head, :BLOCK], query))
            for _, query, key, value, _ in layers
            for head in range(key.shape[1])
        ],
    }
    curves = []
    for kind, heads in kinds.items():
        for capped in (True, False):
            for length in (length for length in LENGTHS if capped or kind != "gaussian" or length <= APART):
                measured = [
                    held(key[:, :, :length], value[:, :, :length], None if capped else delta)
                    for key, value, delta in heads
                    if key.shape[2] >= length
                ]
                if not measured:
                    continue
                held_bytes, clusters = (error.mean(of) for of in zip(*measured, strict=True))
                curves.append(
                    {
                        "keys": kind,
                        "capped": capped,
                        "tokens": length,
                        "resident": held_bytes,
                        "full": length * 2 * DIM * 4,
                        "clusters": clusters,
                    }
                )
                print(curves[-1], flush=True)
    return {"delta": {kind: [delta for *_, delta in heads] for kind, heads in kinds.items()}, "curves": curves}


def radius(key: Tensor, query: Tensor) -> float:
    """Of 64 greedy centers on keys [1, n, D]."""
    curve = clusterability(key, query[0, :1, :16], 64)
    return float(curve.radius[0, -1])


def held(key: Tensor, value: Tensor, delta: float | None) -> tuple[int, int]:
    """(bytes, clusters) after one decoded token."""
    settings = (
        error.DEFAULT if delta is None else dataclasses.replace(error.DEFAULT, delta=delta, clusters=key.shape[2])
    )
    store = new_store(settings.bind(0, key.shape[3], None))
    store.take(key[:, :, :-1], value[:, :, :-1])
    store.append(key[:, :, -1:], value[:, :, -1:])
    return store.resident_bytes(), int(error.sketch_of(store)["active"].sum())


def figure(memory: Mapping[str, Any]) -> bytes:
    """Left: bytes held. Right: clusters. Both against tokens, logarithmic."""
    plot, (left, right) = two_panels()
    names = {"lumps": f"keys in {LUMPS} lumps", "gaussian": "gaussian keys", "demo": "the demo model's keys"}
    for column, (kind, name) in enumerate(names.items()):
        for capped in (True, False):
            curve = [point for point in memory["curves"] if point["keys"] == kind and point["capped"] is capped]
            tokens = [point["tokens"] for point in curve]
            style = {"color": f"C{column}", "marker": ".", "linestyle": "-" if not capped else "--"}
            left.plot(tokens, [point["resident"] / 1e6 for point in curve], **style)
            right.plot(tokens, [point["clusters"] for point in curve], **style, label=None if capped else name)
    left.plot(LENGTHS, [length * 2 * DIM * 4 / 1e6 for length in LENGTHS], color="0.5", linestyle=":")
    left.annotate(
        "full", (LENGTHS[-2], LENGTHS[-2] * 2 * DIM * 4 / 1e6), ha="right", va="bottom", color="0.4", fontsize=8
    )
    right.plot([], [], color="0.3", linestyle="-", label="delta fixed, no cap")
    right.plot([], [], color="0.3", linestyle="--", label=f"default: at most {error.DEFAULT.clusters} clusters")
    for axis, what in ((left, "MB held per KV head (float32)"), (right, "clusters per KV head")):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(LENGTHS, [f"{length // 1024}k" for length in LENGTHS])
        axis.set(xlabel="tokens", ylabel=what)
    right.set_ylim(4, 1e6)
    right.legend(fontsize=8, frameon=False, loc="upper left")
    return png(plot, f"SubGen: memory against tokens, head dim {DIM}")


if __name__ == "__main__":
    main()
