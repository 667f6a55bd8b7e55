"""What benchmarks on the demo model begin with: an artifact of its text; keys, queries and values of unseen text."""

from __future__ import annotations

from typing import Any

import torch

from kvcal.artifacts import Artifact
from kvcal.calibrate import calibrate, make_blocks, open_data
from kvcal.calibrate.capture import LayerTensors, capture


def demo_artifact(loaded: Any, seq_len: int = 2048) -> Artifact:
    """That of `calibrate pca --model demo --data stdlib --num-tokens 131072 --seq-len …`."""
    data = open_data("stdlib")
    blocks = make_blocks(data, loaded.tokenizer, num_tokens=131072, seq_len=seq_len, source=data.source)
    return calibrate(loaded.model, blocks, model_id="demo")


def unseen_layers(loaded: Any, texts: int, tokens: int) -> list[LayerTensors]:
    """Of one dense pass over so many unseen texts of so many tokens."""
    heldout = open_data("stdlib", "heldout")
    blocks = make_blocks(heldout, loaded.tokenizer, num_tokens=texts * tokens, seq_len=tokens)
    found: list[LayerTensors] = []
    with torch.no_grad(), capture(loaded.model, found.append):
        loaded.model(input_ids=blocks.ids.long(), use_cache=False, logits_to_keep=1)
    return found
