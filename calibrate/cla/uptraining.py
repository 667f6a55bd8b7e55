"""Uptraining: a pretrained model whose layers were made to share keys and values is trained to predict with them.

The paper's discussion (Brandon et al. 2024) reports that pretrained models become CLA models by a short training from
pooled projections. Here the original model teaches: it is at hand, and its predictions say more about
every token than the token itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...artifacts import KvcalError, weights_sha256
from ...runtime.cla.sharing import TRAINABLE, Sharing, shared
from ...runtime.cla.sharing_map import SharingMap
from ..blocks import TokenBlocks
from ..checkpoint import run_id
from ..interrupts import Interrupted, deferred_interrupt
from ..models import check_seq_len
from .draws import blocks_of, dropout_seed
from .objective import losses
from .optimizer import Optimizer
from .start import FITTED, check_start, starting_weights
from .training_state import Record, TrainingState

LOSS = "(1 - distill) · cross entropy + distill · KL"
"""As a training's settings name it: earlier ones, which do not, minimised cross entropy + distill · KL."""
Progress = Callable[[int, int, float], None]
"""Called with (steps done, steps in all, loss of the last one)."""


@dataclass(frozen=True)
class Uptraining:
    """How a model is uptrained. Raises KvcalError when made of values that mean nothing."""

    steps: int
    """0: only what the training starts from, where that is fitted."""
    lr: float = 1e-4
    """Peak, after the warm-up; it falls to 0 by half a cosine."""
    distill: float = 1.0
    """The part of the loss that is KL(original ‖ shared); the rest is cross entropy. 1: only what the original model
    predicts is learned, nothing of the text; 0: the original model is not run."""
    batch_size: int = 8
    """Blocks per step."""
    train: str = "shared"
    """"shared": the shared projections and the reading layers' queries and norms; "attention": the attention of every
    layer, and all norms; "all": every parameter. What else was fitted stays as it was fitted."""
    warmup: int | None = None
    """Steps; None: a twentieth of them."""
    seed: int = 0

    def __post_init__(self) -> None:
        known = [name for name in TRAINABLE if name != "none"]
        if self.train not in known:
            raise KvcalError(f"train {self.train!r}: give one of {', '.join(known)}")
        if self.steps < 0:
            raise KvcalError(f"{self.steps} steps: give 1 or more, or 0 for what a training would start from")
        if self.batch_size < 1:
            raise KvcalError(f"batches of {self.batch_size} blocks: give at least 1")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise KvcalError(f"learning rate {self.lr}: give a positive number, e.g. 1e-4")
        if not 0 <= self.distill <= 1:
            raise KvcalError(
                f"distill {self.distill}: give the part of the loss that is KL, from 0 to 1; the rest is cross entropy"
            )
        if not 0 <= self.warmup_steps < max(self.steps, 1) + (self.warmup is None):
            raise KvcalError(f"warm-up of {self.warmup} steps: give fewer than the {self.steps} of the training")

    @property
    def warmup_steps(self) -> int:
        return -(-self.steps // 20) if self.warmup is None else self.warmup


@dataclass(frozen=True)
class Uptrained:
    """What an uptraining gives."""

    weights: Mapping[str, Tensor]
    """By their name in the shared model, on the CPU, in the model's dtype; what `share(weights=…)` takes."""
    history: tuple[Record, ...]
    """Of every step: loss, cross_entropy, kl (absent without distillation; nats per token), gradient_norm, lr."""
    settings: Mapping[str, Any]
    """JSON-able: how and on what it was trained, the losses of the first and the last tenth, `run`."""


def uptrain(
    model: Any,
    blocks: TokenBlocks,
    sharing_map: SharingMap,
    training: Uptraining,
    *,
    pool: str = "mean",
    earlier: Uptrained | None = None,
    beside: Path | None = None,
    resume: bool = False,
    checkpoint_every: int = 100,
    progress: Progress | None = None,
    start: Mapping[str, Tensor] | None = None,
) -> Uptrained:
    """Train `model` with its layers sharing keys and values; it is left as it was found.

    Args:
        model: a transformers causal language model in float32 or bfloat16; with bfloat16, float32 copies of what is
            trained take the steps. Gradients, two moments and the activations of a batch need memory beside it.
        sharing_map: with at least one group of several layers.
        pool: where the training starts: "fitted", by `fit_projections` on some of the blocks, or as in `share`.
        earlier: what a training of the same groups gave (its history is not needed): start from that, instead.
        beside: an artifact's folder; checkpoints go to `beside`.uptraining, the last one at the end of the training:
            remove it once the result is saved. None: no checkpoints.
        checkpoint_every: steps between checkpoints.
        start: what `starting_weights` gave for the same pool and blocks; None: they are made here. Not with `earlier`.

    Raises:
        KvcalError: nothing to train, a model that cannot share or is in float16, an interrupted run in the way, a loss
            that is no number any more, or an interrupt (after a checkpoint).
    """
    check_trainable(model, sharing_map, training, blocks.seq_len, pool, earlier)
    pool = earlier.settings["pool"] if earlier else pool
    if checkpoint_every < 1:
        raise KvcalError(f"a checkpoint every {checkpoint_every} steps: give at least 1")
    if not (blocks.attended.sum(1) > 1).any():
        raise KvcalError("no block has two tokens, of which one predicts the other: give more text")
    settings = run_settings(model, blocks, sharing_map, training, pool, earlier)
    state = None if beside is None else TrainingState.beside(beside, settings["run"])
    if state is not None and not resume:
        state.refuse_to_lose()
    modes = [(module, module.training) for module in model.modules()]
    try:
        resumed = state is not None and state.exists()
        weights = earlier.weights if earlier else start
        if weights is None:
            weights = starting_weights(model.eval(), sharing_map, blocks, pool, resumed)
        first = "mean" if pool == FITTED else pool
        with shared(model, sharing_map, pool=first, weights=weights, trainable=training.train) as sharing:
            optimizer = Optimizer(sharing.parameters, training.lr, training.warmup_steps, training.steps)
            history: list[Record] = []
            if state is not None and resumed:
                history = state.load(optimizer)
            run = _Run(model, sharing, optimizer, _predicting(blocks), training, history)
            run.finish(state, checkpoint_every, progress)
            trained = {name: weight.detach().cpu().clone() for name, weight in sharing.parameters.items()}
    finally:
        if state is not None:
            state.lock.release()
        for module, mode in modes:
            module.training = mode
    return Uptrained(trained, tuple(history), {**settings, **_summary(history)})


def check_trainable(
    model: Any,
    sharing_map: SharingMap,
    training: Uptraining,
    block_size: int,
    pool: str,
    earlier: Uptrained | None,
) -> None:
    """Raise KvcalError for what can be said before there is any text."""
    if not sharing_map.shared:
        raise KvcalError(f"groups {sharing_map}: no two layers share, there is nothing to train: choose other groups")
    if model.dtype == torch.float16:
        raise KvcalError("gradients of a float16 model vanish: load it as bfloat16 or float32 (--dtype)")
    check_seq_len(block_size, model.config)
    if not training.steps and (earlier or pool != FITTED):
        raise KvcalError(
            "0 steps only fit where a training starts: leave --continue and --pool out, or give more steps"
        )
    if not earlier:
        check_start(model, sharing_map, pool)


def run_settings(
    model: Any,
    blocks: TokenBlocks,
    sharing_map: SharingMap,
    training: Uptraining,
    pool: str,
    earlier: Uptrained | None = None,
) -> dict[str, Any]:
    """All that the result depends on, and a name for it under `run`; the settings of `earlier` under `earlier`."""
    if earlier is not None:
        if earlier.settings["groups"] != str(sharing_map):
            raise KvcalError(f"groups {sharing_map}: the earlier training was of {earlier.settings['groups']}")
        pool = earlier.settings["pool"]
    data = {
        "source": blocks.source,
        "content_sha256": blocks.content_hash,
        "blocks": len(blocks),
        "block_size": blocks.seq_len,
    }
    settings = {
        **dataclasses.asdict(training),
        "warmup": training.warmup_steps,
        "pool": pool,
        "groups": str(sharing_map),
        "loss": LOSS,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        **({"earlier": dict(earlier.settings)} if earlier else {}),
    }
    # Where the text came from may differ, its content may not.
    same = {name: value for name, value in data.items() if name != "source"}
    return {**settings, "data": data, "run": run_id({"weights_sha256": weights_sha256(model)}, same, settings)}


@dataclass
class _Run:
    model: Any
    sharing: Sharing
    optimizer: Optimizer
    blocks: TokenBlocks
    training: Uptraining
    history: list[Record]
    """Grows by every step."""

    def finish(self, state: TrainingState | None, checkpoint_every: int, progress: Progress | None) -> None:
        steps = self.training.steps
        gpus = [self.model.device] if self.model.device.type == "cuda" else []
        if progress:
            progress(len(self.history), steps, self.history[-1]["loss"] if self.history else math.nan)
        with deferred_interrupt(enabled=state is not None) as interrupted, torch.random.fork_rng(gpus):
            while len(self.history) < steps:
                try:
                    self._step(state)
                except torch.OutOfMemoryError as error:
                    raise KvcalError(
                        f"out of memory on {self.model.device}: give a smaller --batch-size or --seq-len"
                    ) from error
                done = len(self.history)
                if progress:
                    progress(done, steps, self.history[-1]["loss"])
                # The last step, too: refitting and saving come after it, and may fail.
                if state is not None and (interrupted() or done == steps or done % checkpoint_every == 0):
                    state.save(self.optimizer, self.history)
                    if (number := interrupted()) and done < steps:
                        raise Interrupted(
                            f"interrupted after {done} of {steps} steps, nothing lost: add --resume to continue", number
                        )

    def _step(self, state: TrainingState | None) -> None:
        step, training = len(self.history), self.training
        rows = blocks_of(step, len(self.blocks), training.batch_size, training.seed)
        device = self.model.device
        ids = self.blocks.ids[rows].long().to(device)
        attended = self.blocks.attended[rows].to(device)
        torch.manual_seed(dropout_seed(step, training.seed))
        given = {"input_ids": ids, "attention_mask": attended.long(), "use_cache": False}
        wanted = self._original_logits(given) if training.distill else None
        self.model.train()
        with torch.enable_grad():
            cross_entropy, kl = losses(self.model(**given).logits, wanted, ids, attended)
            loss = cross_entropy if kl is None else training.distill * kl + (1 - training.distill) * cross_entropy
        loss.backward()
        record = {"loss": loss.item(), "cross_entropy": cross_entropy.item(), "gradient_norm": self.optimizer.clip()}
        if kl is not None:
            record["kl"] = kl.item()
        for name, value in record.items():
            if not math.isfinite(value):
                kept = f"; the checkpoint in {state.folder} is of an earlier step" if state and state.exists() else ""
                raise KvcalError(
                    f"{name.replace('_', ' ')} is {value} at step {step + 1} of {training.steps}, the training has "
                    f"diverged: give a smaller --lr (it was {training.lr:g}) or a longer --warmup{kept}"
                )
        record["lr"] = self.optimizer.step()
        self.history.append(record)

    @torch.no_grad()
    def _original_logits(self, given: Mapping[str, Any]) -> Tensor:
        """[B, T, vocabulary], without dropout."""
        with self.sharing.lifted():
            logits: Tensor = self.model.eval()(**given).logits
        return logits


def _predicting(blocks: TokenBlocks) -> TokenBlocks:
    """Without blocks of one token: of a batch of those the loss would be a mean of nothing."""
    rows = blocks.attended.sum(1) > 1
    kept = {name: getattr(blocks, name)[rows] for name in ("ids", "counted", "attended")}
    return dataclasses.replace(blocks, **kept)


def _summary(history: list[Record]) -> dict[str, Any]:
    """Means over the first and the last tenth of the steps."""
    if not history:
        return {"first_losses": {}, "last_losses": {}}
    tenth = -(-len(history) // 10)
    names = [name for name in ("loss", "cross_entropy", "kl") if name in history[0]]
    return {
        when: {name: math.fsum(record[name] for record in part) / len(part) for name in names}
        for when, part in (("first_losses", history[:tenth]), ("last_losses", history[-tenth:]))
    }
