"""Train the model that kvcal ships as `demo`: a small GQA decoder that really retrieves.

    python examples/demo_model/train.py --output RUN --steps 2650

Every optimiser step mixes all lengths and kinds of row (plain text, recall episodes with varying
numbers and positions of questions, repeated noise): training lengths one after the other makes
the shorter ones be forgotten. Resumes from RUN/checkpoint.pt.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from evaluate import evaluate, loss_on
from rows import LENGTHS, LONG_EVERY, LONG_ROW, PHASES, Rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvcal.calibrate.builtin.recall import dictionary
from kvcal.calibrate.builtin.stdlib_text import documents

VOCABULARY = 4096


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; digits stand alone, so that a code is always five tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|eos|>", "<|pad|>"]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[2],
        model_max_length=4096,
        padding_side="left",
    )


def build_model(tokenizer: PreTrainedTokenizerFast, layers: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2650)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=150, help="evaluate and checkpoint every N steps")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    tokenizer_folder = args.output / "tokenizer"
    train_texts = [text for _, text in documents("train")]
    if not tokenizer_folder.exists():
        train_tokenizer(train_texts).save_pretrained(tokenizer_folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    train_words, evaluation_words = dictionary(train_texts)
    rows = Rows(tokenizer, "train", train_words, args.seed)
    heldout = Rows(tokenizer, "heldout", evaluation_words, args.seed + 1)
    print(f"train {len(rows.stream)} tokens, held out {len(heldout.stream)}", flush=True)

    model = build_model(tokenizer, args.layers).to(device).train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / args.warmup, 0.02 + (args.steps - step) / args.steps * 1.2)
    )
    checkpoint = args.output / "checkpoint.pt"
    start, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start, seconds = state["step"], state["seconds"]
        rows.rng.seed(args.seed + 1000 + start)

    log = (args.output / "log.jsonl").open("a")
    for step in range(start, args.steps):
        began = time.perf_counter()
        optimizer.zero_grad()
        total = 0.0
        phase = next(phase for phase in PHASES if step < phase.until)
        for length, count in phase.rows:
            if length == LENGTHS[-1] and step % LONG_EVERY == 0:
                length = LONG_ROW
            ids, weights = (part.to(device) for part in rows.batch(count, length, phase.shares))
            loss = loss_on(model, ids, weights) / len(phase.rows)
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        schedule.step()
        seconds += time.perf_counter() - began
        done = step + 1
        if done % 10 == 0:
            print(f"step {done} loss {total:.3f} grad {norm:.2f} {seconds / done:.2f} s/step", flush=True)
        if done % args.every == 0 or done == args.steps:
            record = {"step": done, "seconds": round(seconds), "train_loss": total, **evaluate(model, heldout)}
            print(json.dumps(record), file=log, flush=True)
            print(record, flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"schedule": schedule.state_dict(), "step": done, "seconds": seconds}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").rename(checkpoint)
    save(model, tokenizer, args.output / "model")


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
