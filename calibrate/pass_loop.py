"""The loop of a calibration pass: this process's batches through the model, its statistics saved now and then."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..artifacts import KvcalError
from ..runtime.integration.routing import backbone
from .blocks import TokenBlocks
from .capture import LayerTensors, capture
from .checkpoint import Checkpoint
from .distributed import World
from .interrupts import Interrupted, deferred_interrupt
from .placement import input_device
from .pre_rotary import PreRotary
from .statistics import StatisticsFitter

Progress = Callable[[int, int], None]
"""Called with (blocks done, blocks in all), of this process's share."""
_NOTHING, _SAVE, _STOP = range(3)


@dataclass
class Saving:
    """Where and how often the state is saved."""

    checkpoint: Checkpoint
    seconds: float
    """At least so many between two checkpoints, more when saving takes long; 0: after every batch."""
    blocks: int | None
    """A checkpoint after so many blocks, too."""

    def __post_init__(self) -> None:
        self._saved_at = time.monotonic()
        self._saved_block = 0
        self._interval = self.seconds

    def start(self, blocks_done: int) -> None:
        self._saved_block = blocks_done

    def due(self, blocks_done: int) -> bool:
        enough = self.blocks is not None and blocks_done - self._saved_block >= self.blocks
        return enough or time.monotonic() - self._saved_at > self._interval

    def saved(self, began: float, blocks_done: int) -> None:
        self._saved_at, self._saved_block = time.monotonic(), blocks_done
        # The state of a large model is gigabytes: at most a twentieth of the time goes into saving it.
        self._interval = max(self.seconds, 20 * (self._saved_at - began)) if self.seconds else 0


class PassLoop:
    """Runs the batches that fall to this rank.

    A batch is always the same blocks, whoever runs it, so that its activations are those of a single process.

    Args:
        statistics: empty; `run` may return another one.
        heads: the model's heads are dealt to the ranks instead of the batches; they then go in step.
    """

    def __init__(
        self,
        model: Any,
        blocks: TokenBlocks,
        statistics: StatisticsFitter,
        batch_size: int,
        world: World,
        *,
        heads: bool,
    ):
        self._decoder = backbone(model)
        self._model, self._blocks, self._statistics, self._world = model, blocks, statistics, world
        self._heads = heads
        starts = range(0, len(blocks), batch_size)
        dealt = range(len(starts)) if heads else world.deal(len(starts))
        self._batches = [slice(starts[index], min(starts[index] + batch_size, len(blocks))) for index in dealt]
        self._pre_rotary = PreRotary()

    @torch.no_grad()
    def run(self, saving: Saving | None, progress: Progress | None = None) -> StatisticsFitter:
        """The statistics after all batches.

        Raises:
            KvcalError: interrupted, another rank is gone, another process is at it, out of memory, NaN activations.
        """
        try:
            return self._run(saving, progress)
        finally:
            if saving:
                saving.checkpoint.lock.release()

    def _run(self, saving: Saving | None, progress: Progress | None) -> StatisticsFitter:
        done = self._resumed(saving.checkpoint) if saving else 0
        if saving:
            saving.start(self._count(done))
        report = progress or (lambda done, total: None)
        total = self._count(len(self._batches))
        settled = False
        report(self._count(done), total)
        insist = self._world.size == 1
        with (
            deferred_interrupt(enabled=saving is not None, insist=insist) as interrupted,
            capture(self._model, self._observe, self._pre_rotary),
        ):
            while done < len(self._batches) or not settled:
                if done < len(self._batches):
                    self._forward(self._batches[done])
                    done += 1
                if not settled:
                    settled = True
                    if self._must_restart():
                        self._statistics = StatisticsFitter(self._statistics.reservoir, self._statistics.seed)
                        done = 0
                        continue
                report(self._count(done), total)
                if done < len(self._batches):
                    self._pause(saving, done, interrupted())
        return self._statistics

    def _resumed(self, checkpoint: Checkpoint) -> int:
        """Take over the state on the disk; returns how many batches it has."""
        done = checkpoint.newest()
        if self._heads:  # in step: what all ranks have
            done = min(self._world.exchange(done))
        if done:
            self._statistics = checkpoint.load(done, self._statistics.reservoir, self._statistics.seed)
            self._pre_rotary.methods = {index: layer.pre_rotary for index, layer in self._statistics.layers.items()}
        return done

    def _observe(self, seen: LayerTensors) -> None:
        self._statistics.update(seen, self._pre_rotary.methods[seen.layer])

    def _forward(self, rows: slice) -> None:
        blocks, device = self._blocks, input_device(self._model)
        tokens = torch.arange(rows.start * blocks.seq_len, rows.stop * blocks.seq_len).view(-1, blocks.seq_len)
        self._statistics.begin_batch(tokens, blocks.counted[rows])
        try:
            with self._world.talking():
                self._decoder(
                    input_ids=blocks.ids[rows].long().to(device),
                    attention_mask=blocks.attended[rows].long().to(device),
                    use_cache=False,
                )
        except torch.OutOfMemoryError as error:
            raise KvcalError(
                f"out of memory on {device} in blocks {rows.start} to {rows.stop - 1}: "
                "give a smaller --batch-size or --seq-len"
            ) from error

    def _must_restart(self) -> bool:
        """Whether this rank undid the rotation in another way than the ranks have now settled on.

        They settle on rank 0's way, as it has the batch by which a single process decides; where ranks share the heads,
        rotating back must be right for all of them.
        """
        mine = self._pre_rotary.methods
        found = [{int(layer): method for layer, method in pairs} for pairs in self._world.exchange(list(mine.items()))]
        chosen = found[0]
        if self._heads:
            chosen = {
                layer: method if all(methods[layer] == method for methods in found) else "replay"
                for layer, method in chosen.items()
            }
        self._pre_rotary.methods = chosen
        return chosen != mine

    def _pause(self, saving: Saving | None, done: int, interrupted: int | None) -> None:
        """Between two batches: save when it is time, end when asked to."""
        world = self._world
        if saving is None:
            return world.check()
        blocks = self._count(done)
        stop = interrupted is not None or world.lost is not None
        wanted = _STOP if stop else _SAVE if saving.due(blocks) else _NOTHING
        if self._heads:
            wanted = max(world.exchange(wanted))
        if wanted == _NOTHING:
            return
        began = time.monotonic()
        saving.checkpoint.save(self._statistics, done)
        if self._heads:
            world.exchange("saved")  # resuming needs a state that all ranks have
        saving.checkpoint.drop_older(done)
        saving.saved(began, blocks)
        if wanted == _STOP:
            world.check()
            whose = f" of rank {world.rank}'s" if world.size > 1 else ""
            total = self._count(len(self._batches))
            raise Interrupted(
                f"interrupted after {blocks} of {total}{whose} blocks, nothing lost: add --resume to continue",
                interrupted or signal.SIGINT,
            )

    def _count(self, batches: int) -> int:
        """Blocks in the first `batches` batches of this rank's share."""
        return sum(rows.stop - rows.start for rows in self._batches[:batches])
