"""Train the model that kvcal ships as `demo`: a small GQA decoder that really retrieves.

    python examples/demo_model/train.py --output RUN --steps 2650

Every optimiser step mixes all lengths and kinds of row (plain text, recall episodes with varying
numbers and positions of questions, repeated noise): training lengths one after the other makes
the shorter ones be forgotten. Resumes from RUN/checkpoint.pt.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvcal.calibrate.builtin.recall import dictionary, make_episode
from kvcal.calibrate.builtin.stdlib_text import documents

VOCABULARY = 4096
LENGTHS = (256, 512, 1024, 2048)
ROWS = ((256, 8), (512, 4), (1024, 2), (2048, 1))  # (tokens, rows) of the micro-batches of a step
SHORT_ROWS = ((128, 16), (256, 8))
LONG_ROW, LONG_EVERY = 4096, 4  # instead of the 2048 row, every fourth step


@dataclass(frozen=True)
class Phase:
    """What rows are drawn until a step."""

    until: float
    rows: tuple[tuple[int, int], ...]
    shares: tuple[float, float, float]
    """Repeated noise, dense recall, sparse recall; the rest is plain text."""


# Text first; then short rows with much to copy, which form the retrieval heads within a hundred
# steps (sparse facts alone had not within 750, and copying without text first had not within 600);
# then all lengths at once to the end.
PHASES = (
    Phase(750, ROWS, (0.0, 0.0, 0.5)),
    Phase(950, SHORT_ROWS, (0.2, 0.25, 0.2)),
    Phase(1200, ROWS, (0.1, 0.2, 0.3)),
    Phase(math.inf, ROWS, (0.03, 0.12, 0.35)),
)
ANSWER_WEIGHT = 8.0


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


class Rows:
    """Draws training rows: plain text, or text with facts and questions in it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, split: str, words: list[str], seed: int):
        self.rng = random.Random(seed)
        self.words = words
        self.bos = tokenizer.bos_token_id
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False, verbose=False)
        self.digits = [self.encode(str(digit))[0] for digit in range(10)]
        stream: list[int] = []
        for _, text in documents(split):
            stream += [*self.encode(text), tokenizer.eos_token_id]
        self.stream = stream

    def draw(self, length: int, shares: tuple[float, float, float]) -> tuple[list[int], list[float]]:
        """One row of `length` tokens and the weight of each in the loss."""
        kind = self.rng.choices(("repeat", "dense", "sparse", "plain"), (*shares, 1 - sum(shares)))[0]
        if kind == "repeat":
            return self.repeat(length)
        return self.plain(length) if kind == "plain" else self.recall(length, dense=kind == "dense")

    def plain(self, length: int) -> tuple[list[int], list[float]]:
        return [self.bos, *self._text(length - 1)], [1.0] * length

    def repeat(self, length: int) -> tuple[list[int], list[float]]:
        """Random tokens (or digits, which need longer matches) again and again; the first time costs nothing."""
        period = self.rng.randint(16, length // 2)
        alphabet = self.digits if self.rng.random() < 0.3 else range(3, VOCABULARY)
        noise = self.rng.choices(alphabet, k=period)
        ids = [self.bos, *noise * (length // period + 1)][:length]
        return ids, [0.0] * (period + 1) + [1.0] * (length - period - 1)

    def recall(self, length: int, dense: bool) -> tuple[list[int], list[float]]:
        rng = self.rng
        if dense:
            ask = num_facts = max(1, (length - 8) // rng.choice((33, 40, 60)))
        else:
            # Log-uniform: from one lonely fact to a row half full of them.
            num_facts = max(1, round(math.exp(rng.uniform(0, math.log(max(2, (length - 32) // 40))))))
            ask = rng.randint(1, min(num_facts, 12))
        text = self._text(length)
        filler = max(0, length - 1 - 13 * num_facts - 22 * ask)
        episode = make_episode(
            self.encode, text[:filler], self.words, num_facts, rng, ask=ask, questions_last=rng.random() < 0.5
        )
        ids = [self.bos, *episode.ids, *text[filler:]][:length]
        weights = [1.0] * length
        for answer in episode.answers:
            for position in answer:
                if position + 1 < length:
                    weights[position + 1] = ANSWER_WEIGHT
        return ids, weights

    def batch(self, count: int, length: int, shares: tuple[float, float, float]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, weights = zip(*[self.draw(length, shares) for _ in range(count)], strict=True)
        return torch.tensor(ids), torch.tensor(weights)

    def _text(self, length: int) -> list[int]:
        at = self.rng.randrange(len(self.stream) - length)
        return self.stream[at : at + length]


def loss_on(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu" if ids.device.type == "cpu" else "cuda", torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, rows: Rows, episodes: int = 32, lengths: tuple[int, ...] = LENGTHS) -> dict:
    """Held-out loss on plain text and exact recall by length: one fact of eight asked at the end."""
    model.eval()
    rows.rng.seed(1234)
    device = model.device
    losses = []
    for _ in range(16):
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
