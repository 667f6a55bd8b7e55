"""What the tests in this folder compare vLLM with, made where transformers and `calibrate` are: artifacts, and the
tokens that the transformers engine decodes from them, each prompt by itself.

    python tests/vllm/prepare.py FOLDER
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

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
WINDOWS = {
    "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "query_pre_attn_scalar": 32, "max_position_embeddings": 2048,
    "sliding_window": 96, "layer_types": ["sliding_attention", "full_attention"] * 2, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
"""Of a Gemma 3, whose weights are drawn at random: every other layer has a window."""
PLAN = {"format": 1, "layers": [None, *[{"method": "spectral", "rank": 32, "rows": 8, "keep": 0.125}] * 3]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    smollm2 = resolve_model("smollm2-135m")
    models = {
        "demo": DEMO_FOLDER,
        "smollm2": smollm2.folder or converted(smollm2.gguf, smollm2.id),
        "windows": with_windows(folder / "windows-model"),
    }
    text = "\n\n".join(text for _, text in documents("heldout"))
    found: dict[str, Any] = {}
    forms: dict[str, tuple[str, int, Any]] = {
        "demo": ("demo", 16384, DEMO),
        "smollm2": ("smollm2-135m", 8192, SMOLLM2),
        "windows": (str(models["windows"]), 4096, ()),
    }
    for name, (source, tokens, asked_of) in forms.items():
        artifact = folder / name
        if not artifact.exists():
            command = [sys.executable, "-m", "kvcal.calibrate", "pca", "--model", source, "--data", "stdlib"]
            subprocess.run(
                [*command, "--num-tokens", str(tokens), "--seq-len", "2048", "--output", artifact], check=True
            )
        model = AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float32).eval()
        ids = AutoTokenizer.from_pretrained(models[name])(text[: 12 * sum(LENGTHS)]).input_ids
        starts = [sum(LENGTHS[:number]) for number in range(len(LENGTHS))]
        prompts = [ids[start : start + length] for start, length in zip(starts, LENGTHS, strict=True)]
        assert all(len(prompt) == length for prompt, length in zip(prompts, LENGTHS, strict=True))
        expected = [{"asked": asked, "tokens": decoded(model, prompts, artifact, asked)} for asked in asked_of]
        if name == "demo":
            (artifact / "plan.json").write_text(json.dumps(PLAN))
            expected.append({"asked": {}, "tokens": decoded(model, prompts, artifact, {})})
        found[name] = {"model": str(models[name]), "artifact": str(artifact), "prompts": prompts, "expected": expected}
    (folder / "expected.json").write_text(json.dumps(found))


def with_windows(folder: Path) -> Path:
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**WINDOWS))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3 if weight.dim() > 1 else 1)  # as they are drawn all tokens are equally likely
    model.save_pretrained(folder)
    for file in DEMO_FOLDER.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


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
