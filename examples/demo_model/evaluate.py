"""Held-out perplexity and exact recall of a model folder; writes both into its card.

python examples/demo_model/evaluate.py RUN/model --log RUN/log.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rows import LENGTHS, Rows
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from kvcal.calibrate.builtin.recall import dictionary, make_episode
from kvcal.calibrate.builtin.stdlib_text import documents


def loss_on(model: Any, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu" if ids.device.type == "cpu" else "cuda", torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


@torch.no_grad()
def evaluate(
    model: Any, rows: Rows, episodes: int = 32, lengths: tuple[int, ...] = LENGTHS, rows_of_text: int = 16
) -> dict[str, Any]:
    """Held-out loss on plain text and exact recall by length: one fact of eight asked at the end."""
    model.eval()
    rows.rng.seed(1234)
    device = model.device
    losses = []
    for _ in range(rows_of_text):
        ids, weights = (torch.tensor([part]).to(device) for part in rows.plain(1024))
        losses.append(loss_on(model, ids, weights).item())
    recall = {}
    for length in lengths:
        hits = 0
        for _ in range(episodes):
            at = rows.rng.randrange(len(rows.stream) - length)
            filler = rows.stream[at : at + length - 8 * 13 - 32]
            episode = make_episode(rows.encode, filler, rows.words, 8, rows.rng)
            answer = episode.answers[0]
            ids = torch.tensor([[rows.bos, *episode.ids[: answer.stop]]]).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(answer) + 1).logits
            # Teacher-forced argmax at every answer token == greedy decoding gives the exact answer.
            hits += bool((logits[0, :-1].argmax(-1) == ids[0, -len(answer) :]).all())
        recall[length] = hits / episodes
    model.train()
    mean = sum(losses) / len(losses)
    return {"heldout_loss": round(mean, 4), "heldout_perplexity": round(math.exp(mean), 3), "recall": recall}


CARD = """---
license: apache-2.0
library_name: transformers
---

# kvcal's demo model

A {layers}-layer Llama ({parameters:.1f}M parameters, hidden {hidden}, {heads} query and {kv_heads} KV heads,
head dim {head_dim}, context {context}, byte-level BPE of {vocabulary}), trained from nothing by
`examples/demo_model/train.py` on the built-in text
`stdlib` (Python {python}) mixed with key-value recall episodes. Small enough to ship, and its attention
really retrieves, so that mechanics can be tried; what methods lose on it says little about larger models.

| | |
| --- | --- |
| perplexity per token, held-out files (64 rows of 1024 tokens) | {perplexity:.2f} |
| training | {steps} steps, {minutes} minutes on 2 CPU cores shared with other work, seed {seed} |
| weights | bfloat16 |

Exact recall of a five-digit code, greedy, {episodes} episodes per length: one of eight facts, scattered in held-out
text, asked for at the end; the words were never used in training. Training rows have 256 to 2048 tokens,
and one of every fourth step 4096.

| tokens | exact recall |
| --- | --- |
{recall}
{note}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--log", type=Path, required=True, help="log.jsonl of the training run")
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="the run's, for the card")
    parser.add_argument("--note", default="", help="anything else that a reader of the card should know")
    args = parser.parse_args()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.folder)
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32, attn_implementation="sdpa")
    _, words = dictionary(text for _, text in documents("train"))
    heldout = Rows(tokenizer, "heldout", words, seed=1)
    found = evaluate(model, heldout, args.episodes, (*LENGTHS, 4096), rows_of_text=64)
    print(json.dumps(found))
    config, last = model.config, json.loads(args.log.read_text().splitlines()[-1])
    card = CARD.format(
        layers=config.num_hidden_layers,
        parameters=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        context=config.max_position_embeddings,
        vocabulary=config.vocab_size,
        python=platform.python_version(),
        perplexity=found["heldout_perplexity"],
        steps=last["step"],
        minutes=round(last["seconds"] / 60),
        seed=args.seed,
        episodes=args.episodes,
        recall="\n".join(f"| {length} | {100 * share:.1f} % |" for length, share in found["recall"].items()),
        note=args.note,
    )
    (args.folder / "README.md").write_text(card.rstrip() + "\n")


if __name__ == "__main__":
    main()
