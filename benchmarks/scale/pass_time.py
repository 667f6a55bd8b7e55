"""Seconds that calibration adds to a plain forward pass, by part, and the models and texts it is timed with."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kvcal.artifacts import weights_sha256
from kvcal.calibrate import TokenBlocks, calibrate, load_model, make_blocks, open_data, save
from kvcal.calibrate.capture import LayerTensors, capture
from kvcal.calibrate.pre_rotary import PreRotary
from kvcal.calibrate.statistics import StatisticsFitter
from kvcal.runtime.integration.routing import backbone
from kvcal.runtime.integration.support import watched

from ..shared.measure import Timer

USUAL_TOKENS = 131072
"""What `calibrate pca` runs by default: the costs that come once are spread over them."""

TERMS = {
    "forward": "the decoder without its language-model head, no gradients, no capture",
    "pre_rotary_capture": "with an observer that does nothing, less forward: hooks, routing, rotating back",
    "statistics": "the whole calibration of a block, less the two above: moments, NaN check, reservoir",
    "hashes": "sha256 of the weights and of the token blocks",
    "find_attention": "once per model: a prompt of two tokens and a step, which find the attention layers",
    "first_block": "what the first block costs more: the replay of each layer that the rotating back is checked with",
    "finalize": "eigendecompositions, score bases, the reservoir in order",
    "write": "saving the artifact, synced, and reading it back to check",
}


def measure_pass(model: Any, blocks: TokenBlocks, rounds: int, timer: Timer) -> dict[str, Any]:
    """Seconds for one block in the steady state and for what is done once, as `TERMS` says, and their ratios.

    `pass_ratio`, calibration over forward for one block, is what the target is about.
    """
    with torch.no_grad():
        block, statistics = time_block(model, blocks, rounds, timer)
    once = time_once(model, blocks, statistics, max(2, rounds // 5), timer)
    with tempfile.TemporaryDirectory() as folder:
        whole = timer.alternate(
            {
                "forward": lambda _: timer.seconds(lambda: plain_pass(model, blocks)),
                "calibration": lambda number: timer.seconds(
                    lambda: save(calibrate(model, blocks), Path(folder) / str(number))
                ),
            },
            max(1, rounds // 5),
        )
    once_per_usual_block = sum(once.values()) * blocks.seq_len / USUAL_TOKENS
    return {
        "blocks": len(blocks),
        "seq_len": blocks.seq_len,
        "pre_rotary": sorted({layer.pre_rotary for layer in statistics.layers.values()}),
        "per_block_seconds": {
            "forward": block["forward"],
            "pre_rotary_capture": block["capture"] - block["forward"],
            "statistics": block["calibration"] - block["capture"],
        },
        "once_seconds": once,
        "pass_ratio": block["calibration"] / block["forward"],
        "whole_run_ratio": whole["calibration"] / whole["forward"],
        "whole_run_ratio_at_131072": (block["calibration"] + once_per_usual_block) / block["forward"],
    }


def time_block(model: Any, blocks: TokenBlocks, rounds: int, timer: Timer) -> tuple[dict[str, float], StatisticsFitter]:
    """Median seconds of a block: forward alone, with capture, with the whole calibration; and what that gathered."""
    statistics, known = StatisticsFitter(), PreRotary()

    def calibrated(number: int) -> None:
        row, start = number % len(blocks), number * blocks.seq_len
        statistics.begin_batch(torch.arange(start, start + blocks.seq_len)[None], blocks.counted[row : row + 1])
        forward(model, blocks, number)

    def update(seen: LayerTensors) -> None:
        statistics.update(seen, known.methods[seen.layer])

    block = timer.alternate(
        {
            "forward": lambda number: timer.seconds(lambda: forward(model, blocks, number)),
            "capture": lambda number: captured(model, lambda: forward(model, blocks, number), known, timer),
            "calibration": lambda number: captured(model, lambda: calibrated(number), known, timer, update),
        },
        rounds,
    )
    return block, statistics


def time_once(
    model: Any, blocks: TokenBlocks, statistics: StatisticsFitter, rounds: int, timer: Timer
) -> dict[str, float]:
    """Median seconds of what a run does once."""
    artifact = calibrate(model, blocks)
    known = PreRotary({index: layer.pre_rotary for index, layer in statistics.layers.items()})

    def block_seconds(pre_rotary: PreRotary) -> float:
        return captured(model, lambda: forward(model, blocks, 0), pre_rotary, timer)

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        return timer.alternate(
            {
                "hashes": lambda _: timer.seconds(lambda: (weights_sha256(model), blocks.content_hash)),
                "find_attention": lambda _: timer.seconds(lambda: watched(model)),
                "first_block": lambda _: block_seconds(PreRotary()) - block_seconds(known),
                "finalize": lambda _: timer.seconds(statistics.finalize),
                "write": lambda number: timer.seconds(lambda: save(artifact, Path(folder) / str(number))),
            },
            rounds,
        )


def forward(model: Any, blocks: TokenBlocks, number: int) -> None:
    rows = slice(number % len(blocks), number % len(blocks) + 1)
    ids, attended = blocks.ids[rows].long(), blocks.attended[rows].long()
    backbone(model)(input_ids=ids, attention_mask=attended, use_cache=False)


@torch.no_grad()
def plain_pass(model: Any, blocks: TokenBlocks) -> None:
    for number in range(len(blocks)):
        forward(model, blocks, number)


def captured(
    model: Any,
    call: Callable[[], None],
    pre_rotary: PreRotary,
    timer: Timer,
    observe: Callable[[LayerTensors], None] = lambda seen: None,
) -> float:
    """Seconds of a call inside capture(), without those for entering it."""
    with capture(model, observe, pre_rotary):
        return timer.seconds(call)


def text_run(model: str, count: int, seq_len: int) -> tuple[Any, TokenBlocks]:
    """A model and blocks of the built-in text."""
    loaded, data = load_model(model, device="cpu"), open_data("stdlib")
    return loaded.model, make_blocks(data, loaded.tokenizer, count * seq_len, seq_len, data.source)


def layer_7b_run(count: int, seq_len: int) -> tuple[Any, TokenBlocks]:
    """One layer of the Llama-3-8B and Mistral-7B shape; its time does not depend on its weights or the text."""
    import transformers

    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = transformers.LlamaConfig(**shape, head_dim=128, num_hidden_layers=1, vocab_size=256)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    ids = torch.randint(0, 256, (count, seq_len), dtype=torch.int32)
    counted = torch.ones_like(ids, dtype=torch.bool)
    counted[:, 0] = False  # as after a BOS
    return model, TokenBlocks(ids, counted, torch.ones_like(counted), {"id": "random"})
