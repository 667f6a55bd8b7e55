"""The calibration pass: run the model over token blocks once, derive everything else from what it saved."""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import artifacts
from ..artifacts import Artifact, KvcalError, ModelIdentity, Stage, differences, fingerprint, weights_sha256
from ..artifacts.folder import has_content
from ..artifacts.manifest import MANIFEST
from ..runtime.integration.routing import backbone
from .blocks import TokenBlocks
from .capture import LayerTensors, capture
from .checkpoint import Checkpoint, run_id
from .interrupts import deferred_interrupt
from .models import check_seq_len
from .pre_rotary import PreRotary
from .statistics import StatisticsFitter

Progress = Callable[[int, int], None]
"""Called with (blocks done, blocks in all)."""


def calibrate(
    model: Any,
    blocks: TokenBlocks,
    *,
    output: str | os.PathLike[str] | None = None,
    model_id: str = "unnamed",
    revision: str | None = None,
    centred: bool = True,
    reservoir: int = 4096,
    seed: int = 0,
    batch_size: int = 1,
    resume: bool = False,
    checkpoint_every: float = 60.0,
    progress: Progress | None = None,
) -> Artifact:
    """One pass of `model` over `blocks`: moments, PCA, score-optimal basis and the reservoir.

    Args:
        model: a transformers decoder in eval mode, left as found.
        output: where the artifact is going to be saved; the pass keeps its checkpoint beside it
            (`OUTPUT.partial`) and finds it there with `resume`. None: no checkpoints.
        model_id, revision: how the artifact names the model.
        centred: PCA of the covariance; False: of the second moment.
        reservoir: tokens whose keys, queries and values are kept.
        checkpoint_every: seconds between checkpoints, more when saving takes long; 0: after every batch.

    Returns:
        The artifact in memory, for `save` to write; or the one at `output` when it is of this very run.

    Raises:
        KvcalError: text longer than the model's context, NaN activations, an unsupported architecture,
            an interrupted run in the way.
    """
    if batch_size < 1:
        raise KvcalError(f"batch size {batch_size}: give at least 1")
    if reservoir < 2:
        raise KvcalError(f"reservoir of {reservoir} tokens: give at least 2")
    if model.training:
        raise KvcalError(
            "the model is in training mode, where dropout makes every run another: call model.eval() first"
        )
    check_seq_len(blocks.seq_len, model.config)
    output = Path(output) if output is not None else None
    if output is not None:
        check_output(output)
    if progress:
        progress(0, len(blocks))
    identity = ModelIdentity(model_id, revision, fingerprint(model.config), weights_sha256(model))
    data = {
        "content_sha256": blocks.content_hash,
        "blocks": len(blocks),
        "seq_len": blocks.seq_len,
        "tokens_counted": int(blocks.counted.sum()),
    }
    settings = {
        "centred": centred,
        "reservoir": reservoir,
        "seed": seed,
        "batch_size": batch_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
    }
    if output is not None and has_content(output):
        found = _same_run(output, identity, data, settings)
        Checkpoint.beside(output, "").remove()  # a kill after saving may have left it
        return found
    statistics = StatisticsFitter(reservoir, seed)
    checkpoint = None
    done = 0
    if output is not None:
        checkpoint = Checkpoint.beside(output, run_id(dataclasses.asdict(identity), data, settings))
        if checkpoint.exists():
            if not resume:
                raise KvcalError(
                    f"{checkpoint.folder}: an interrupted run is there: add --resume to continue it, "
                    "or remove the folder"
                )
            done = checkpoint.load(statistics)
    _run(model, blocks, statistics, done, batch_size, checkpoint, checkpoint_every, progress)

    tensors = statistics.finalize(centred=centred)
    tensors["reservoir"]["position"] = tensors["reservoir"]["token"] % blocks.seq_len
    return Artifact(
        model=identity,
        layers=tuple(layer for _, layer in sorted(statistics.layers.items())),
        data={"source": blocks.source, **data},
        settings=settings,
        versions=versions(),
        stages={name: Stage(found) for name, found in tensors.items()},
    )


def save(artifact: Artifact, output: str | os.PathLike[str], extras: dict[str, bytes] | None = None) -> Artifact:
    """Write a calibrated artifact and drop the checkpoint of its run."""
    saved = artifacts.save(artifact, output, extras)
    Checkpoint.beside(Path(output), "").remove()
    return saved


def check_output(output: Path) -> None:
    """Raise KvcalError when nothing can be saved at `output`, before any work is done."""
    if output.absolute() == Path.cwd():
        raise KvcalError(f"{output}: is the current folder, which cannot appear at once: give --output a name in it")
    if has_content(output) and not (output / MANIFEST).is_file():
        raise KvcalError(f"{output}: exists and is not an artifact: choose another --output")


def _same_run(output: Path, identity: ModelIdentity, data: dict[str, Any], settings: dict[str, Any]) -> Artifact:
    found = artifacts.load(output)
    # Where the text came from may differ, its content may not.
    text = {name: value for name, value in found.data.items() if name != "source"}
    sides = [(dataclasses.asdict(found.model), dataclasses.asdict(identity)), (text, data), (found.settings, settings)]
    different = [difference for side in sides for difference in differences(*side)]
    for name, here, wanted in different:
        more = f" and {len(different) - 1} more" if len(different) > 1 else ""
        raise KvcalError(
            f"{output}: holds the artifact of another run ({name} {here!r} there, {wanted!r} asked for{more}): "
            "choose another --output, or remove it"
        )
    return found


def versions() -> dict[str, str]:
    """Versions of everything that can change the numbers."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("kvcal", "torch", "transformers", "safetensors", "numpy", "faiss-cpu", "faiss-gpu", "scikit-learn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@torch.no_grad()
def _run(
    model: Any,
    blocks: TokenBlocks,
    statistics: StatisticsFitter,
    done: int,
    batch_size: int,
    checkpoint: Checkpoint | None,
    checkpoint_every: float,
    progress: Progress | None,
) -> None:
    decoder = backbone(model)
    pre_rotary = PreRotary({index: layer.pre_rotary for index, layer in statistics.layers.items()})
    total, seq_len = len(blocks), blocks.seq_len
    saved_at = time.monotonic()
    interval = checkpoint_every

    def observe(seen: LayerTensors) -> None:
        statistics.update(seen, pre_rotary.methods[seen.layer])

    if progress:
        progress(done, total)
    with deferred_interrupt(enabled=checkpoint is not None) as interrupted, capture(model, observe, pre_rotary):
        while done < total:
            rows = slice(done, min(done + batch_size, total))
            index = torch.arange(rows.start * seq_len, rows.stop * seq_len).view(-1, seq_len)
            statistics.begin_batch(index, blocks.counted[rows])
            try:
                decoder(
                    input_ids=blocks.ids[rows].long().to(model.device),
                    attention_mask=blocks.attended[rows].long().to(model.device),
                    use_cache=False,
                )
            except torch.OutOfMemoryError as error:
                raise KvcalError(
                    f"out of memory on {model.device} in blocks {rows.start} to {rows.stop - 1}: "
                    "give a smaller --batch-size or --seq-len"
                ) from error
            done = rows.stop
            if progress:
                progress(done, total)
            if checkpoint and done < total and (interrupted() or time.monotonic() - saved_at > interval):
                began = time.monotonic()
                checkpoint.save(statistics, done)
                saved_at = time.monotonic()
                # The state of a large model is gigabytes: at most a twentieth of the time goes into saving it.
                interval = max(checkpoint_every, 20 * (saved_at - began)) if checkpoint_every else 0
                if interrupted():
                    raise KvcalError(
                        f"interrupted after {done} of {total} blocks, nothing lost: add --resume to continue"
                    )
