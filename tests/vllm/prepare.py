"""What the tests in this folder compare vLLM with, made where transformers and `calibrate` are: artifacts, and the
tokens that the transformers engine decodes from them, each prompt by itself.

    python tests/vllm/prepare.py FOLDER
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvcal.calibrate.builtin.stdlib_text import documents
from kvcal.calibrate.models.aliases import DEMO_FOLDER
from kvcal.calibrate.models.converted import converted
from kvcal.calibrate.models.source import resolve_model
from kvcal.runtime import decode, load

NEW_TOKENS = 16
LENGTHS = (5, 9, 17, 33, 40, 63, 64, 65, 90, 100, 127, 128, 129, 160, 200, 300)
"""Tokens of the prompts: pages are full, begun, and one token short of it."""
SMOLLM2 = ({"method": "spectral"}, {"method": "loki"})
DEMO: tuple[dict[str, Any], ...] = (
    {"method": "full"},
    {"method": "quest", "keep": 0.25},
    {"method": "sparq", "keep": 0.25},
    {"method": "loki", "basis": "pca"},
    {"method": "spectral", "rows": 8},
    {"method": {"0": "full", "1": {"method": "quest", "keep": 64}, "2-": {"method": "spectral", "bits": 4}}},
)
PLAN = {"format": 1, "layers": [None, *[{"method": "spectral", "rank": 32, "rows": 8, "keep": 0.125}] * 3]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    smollm2 = resolve_model("smollm2-135m")
    models = {"demo": DEMO_FOLDER, "smollm2": smollm2.folder or converted(smollm2.gguf, smollm2.id)}
    text = "\n\n".join(text for _, text in documents("heldout"))
    found: dict[str, Any] = {}
    for name, (alias, tokens, forms) in {
        "demo": ("demo", 32768, DEMO), "smollm2": ("smollm2-135m", 8192, SMOLLM2)
    }.items():  # fmt: skip
        artifact = folder / name
        if not artifact.exists():
            command = [sys.executable, "-m", "kvcal.calibrate", "pca", "--model", alias, "--data", "stdlib"]
            subprocess.run(
                [*command, "--num-tokens", str(tokens), "--seq-len", "2048", "--output", artifact], check=True
            )
        model = AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float32).eval()
        ids = AutoTokenizer.from_pretrained(models[name])(text[: 12 * sum(LENGTHS)]).input_ids
        starts = [sum(LENGTHS[:number]) for number in range(len(LENGTHS))]
        prompts = [ids[start : start + length] for start, length in zip(starts, LENGTHS, strict=True)]
        assert all(len(prompt) == length for prompt, length in zip(prompts, LENGTHS, strict=True))
        expected = [{"asked": asked, "tokens": decoded(model, prompts, artifact, asked)} for asked in forms]
        if name == "demo":
            (artifact / "plan.json").write_text(json.dumps(PLAN))
            expected.append({"asked": {}, "tokens": decoded(model, prompts, artifact, {})})
        found[name] = {"model": str(models[name]), "artifact": str(artifact), "prompts": prompts, "expected": expected}
    (folder / "expected.json").write_text(json.dumps(found))


def decoded(model: Any, prompts: list[list[int]], artifact: Path, asked: dict[str, Any]) -> list[list[int]]:
    settings = dict(asked)
    method, loaded = settings.pop("method", None), load(artifact)
    tokens = []
    for prompt in prompts:
        out = decode(
            model, torch.tensor([prompt]), loaded, method, max_new_tokens=NEW_TOKENS, eos_token_id=-1, **settings
        )
        tokens.append(out.tokens[0, len(prompt) :].tolist())
    return tokens


if __name__ == "__main__":
    main()
