"""The calibration pass: run the model over token blocks once, derive everything else from what it saved."""

from __future__ import annotations

import dataclasses
import os
import platform
from pathlib import Path
from typing import Any

from .. import artifacts
from ..artifacts import Artifact, KvcalError, ModelIdentity, Stage, differences, fingerprint
from ..artifacts.manifest import MANIFEST
from ..artifacts.places import check_new_folder
from ..artifacts.writing import has_content
from ..runtime.wrapped import unwrapped
from .blocks import TokenBlocks
from .capture import check_capture
from .checkpoint import Checkpoint, run_id
from .codebook_stage import codebook
from .distributed import SINGLE, World
from .distributed.merging import join_heads, merge_tokens
from .models import check_seq_len
from .pass_loop import PassLoop, Progress, Saving
from .placement import input_device, is_tensor_parallel, whole_weights_sha256
from .reservoir import TOKENS
from .statistics import StatisticsFitter


def calibrate(
    model: Any,
    blocks: TokenBlocks,
    *,
    output: str | os.PathLike[str] | None = None,
    model_id: str = "unnamed",
    revision: str | None = None,
    centred: bool = True,
    reservoir: int = TOKENS,
    seed: int = 0,
    batch_size: int = 1,
    resume: bool = False,
    checkpoint_every: float = 60.0,
    checkpoint_blocks: int | None = None,
    progress: Progress | None = None,
    codebook_progress: Progress | None = None,
    world: World = SINGLE,
) -> Artifact:
    """One pass of `model` over `blocks`: moments, PCA, score-optimal basis, the reservoir, and codebooks of it.

    Args:
        model: a transformers decoder in eval mode, left as found.
        output: where the artifact is going to be saved; the pass keeps its checkpoint beside it
            (`OUTPUT.partial`) and finds it there with `resume`. None: no checkpoints.
        model_id, revision: how the artifact names the model.
        centred: PCA of the covariance; False: of the second moment.
        reservoir: tokens whose keys, queries and values are kept.
        checkpoint_every: seconds between checkpoints, more when saving takes long; 0: after every batch.
        checkpoint_blocks: also after so many blocks.
        progress, codebook_progress: called with what is done and what there is in all: blocks, then layers.
        world: the processes that share the work: batches are dealt to them in turn, or, of a tensor-parallel model,
            each has its heads in all batches. All call this alike and see the same file system.

    Returns:
        The artifact in memory, the same on every rank, for `save` to write on rank 0; or the one at `output` when it
        is of this very run.

    Raises:
        KvcalError: text longer than the model's context, NaN activations, an unsupported architecture,
            an interrupted run in the way.
    """
    if not isinstance(blocks, TokenBlocks):
        raise KvcalError(f"blocks: a {type(blocks).__name__}: give what make_blocks(documents, tokenizer) makes")
    model = unwrapped(model)
    if batch_size < 1:
        raise KvcalError(f"batch size {batch_size}: give at least 1")
    if checkpoint_blocks is not None and checkpoint_blocks < 1:
        raise KvcalError(f"a checkpoint every {checkpoint_blocks} blocks: give at least 1")
    if reservoir < 2:
        raise KvcalError(f"reservoir of {reservoir} tokens: give at least 2")
    if model.training:
        raise KvcalError(
            "the model is in training mode, where dropout makes every run another: call model.eval() first"
        )
    import faiss  # noqa: F401 (codebooks need it after the pass: where it is missing, raise before)

    check_capture(model)
    check_seq_len(blocks.seq_len, model.config)
    output = Path(output) if output is not None else None
    if output is not None:
        check_output(output)
    if progress:
        progress(0, len(blocks))
    identity = ModelIdentity(model_id, revision, fingerprint(model.config), whole_weights_sha256(model))
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
        "device": input_device(model).type,
    }
    run = _agreed(world, run_id(dataclasses.asdict(identity), data, settings))
    if output is not None and world.agree(has_content(output)):
        found = _same_run(output, identity, data, settings)
        if world.first:
            Checkpoint.beside(output, "").remove()  # a kill after saving may have left it
        return found
    heads = is_tensor_parallel(model)
    saving = None
    if output is not None:
        kind = "heads" if heads else "blocks"
        checkpoint = Checkpoint.beside(output, run, kind, world.rank, world.size)
        if world.agree(checkpoint.exists()) and not resume:
            raise KvcalError(
                f"{checkpoint.folder}: an interrupted run is there: add --resume to continue it, or remove the folder"
            )
        saving = Saving(checkpoint, checkpoint_every, checkpoint_blocks)
    loop = PassLoop(model, blocks, StatisticsFitter(reservoir, seed), batch_size, world, heads=heads)
    statistics = loop.run(saving, progress)
    if heads:
        statistics = join_heads(statistics, world, identity.fingerprint)
    else:
        statistics = merge_tokens(statistics, world)

    tensors = statistics.finalize(centred=centred)
    tensors["reservoir"]["position"] = tensors["reservoir"]["token"] % blocks.seq_len
    found = Artifact(
        model=identity,
        layers=tuple(layer for _, layer in sorted(statistics.layers.items())),
        data={"source": blocks.source, **data},
        settings=settings,
        versions=versions(),
        stages={name: Stage(stage_tensors) for name, stage_tensors in tensors.items()},
    )
    if not found.full_layers:  # where all layers have a sliding window, nothing decodes with a codebook
        return found
    return codebook(found, report=False, progress=codebook_progress, world=world)


def save(artifact: Artifact, output: str | os.PathLike[str], extras: dict[str, bytes] | None = None) -> Artifact:
    """Write a calibrated artifact and drop the checkpoint of its run."""
    saved = artifacts.save(artifact, output, extras)
    Checkpoint.beside(Path(output), "").remove()
    return saved


def check_output(output: Path) -> None:
    """Raise KvcalError when nothing can be saved at `output`, before any work is done."""
    if output.absolute() == Path.cwd():
        raise KvcalError(f"{output}: is the current folder, which cannot appear at once: give --output a name in it")
    check_new_folder(output)
    if has_content(output) and not (output / MANIFEST).is_file():
        raise KvcalError(f"{output}: exists and is not an artifact: choose another --output")
    beside = Checkpoint.beside(output, "").folder
    if beside.is_symlink() or (beside.exists() and not beside.is_dir()):
        raise KvcalError(f"{beside}: is no folder, and the pass keeps its checkpoints there: remove it")


def _agreed(world: World, run: str) -> str:
    """The run id, which has to be the same on all ranks: otherwise the artifact would be wrong."""
    runs = world.exchange(run)
    for rank, other in enumerate(runs):
        if other != runs[0]:
            raise KvcalError(
                f"rank {rank} of {world.size} has another model, text or settings than rank 0: "
                "give all of them the same files and the same command"
            )
    return run


def _same_run(output: Path, identity: ModelIdentity, data: dict[str, Any], settings: dict[str, Any]) -> Artifact:
    found = artifacts.load(output)
    if found.slim_of is not None:
        raise KvcalError(f"{output}: holds a slim artifact: choose another --output, or remove it")
    # Where the text came from may differ, its content may not.
    text = {name: value for name, value in found.data.items() if name != "source"}
    sides = [
        ({"model": found.model.id}, {"model": identity.id}),
        (dataclasses.asdict(found.model), dataclasses.asdict(identity)),
        (text, data),
        (found.settings, settings),
    ]
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
