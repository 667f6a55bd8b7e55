"""The calibration pass: run the model over token blocks once, derive everything else from what it saved."""

from __future__ import annotations

import dataclasses
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import artifacts
from ..artifacts import Artifact, KvcalError, ModelIdentity, Stage, differences, fingerprint
from ..artifacts.folder import check_replaceable
from ..artifacts.manifest import MANIFEST
from ..artifacts.packages import require
from ..artifacts.places import check_new_folder
from ..artifacts.writing import has_content
from .blocks import TokenBlocks
from .capture import check_capture
from .checkpoint import Checkpoint, run_id
from .codebook_stage import codebook
from .defaults import RESERVOIR
from .distributed import SINGLE, World
from .distributed.merging import join_heads, merge_tokens
from .inputs import Named, TextNames, load_inputs
from .models import check_seq_len
from .pass_loop import PassLoop, Progress, Saving
from .placement import input_device, is_tensor_parallel, whole_weights_sha256
from .sample_size import warn_if_small
from .statistics import StatisticsFitter

if TYPE_CHECKING:
    from typing_extensions import Unpack


def calibrate(
    model: Any,
    data: TokenBlocks | TextNames,
    *,
    output: str | os.PathLike[str] | None = None,
    model_id: str | None = None,
    revision: str | None = None,
    centred: bool = True,
    reservoir: int = RESERVOIR,
    seed: int = 0,
    batch_size: int = 1,
    resume: bool = False,
    replace: bool = False,
    checkpoint_every: float = 60.0,
    checkpoint_blocks: int | None = None,
    progress: Progress | None = None,
    codebook_progress: Progress | None = None,
    world: World = SINGLE,
    **named: Unpack[Named],
) -> Artifact:
    """One pass of a model over text: moments, PCA, score-optimal basis, the reservoir, and codebooks of it.

        calibrate("smollm2-135m", "text/", num_tokens=65536).save_pretrained("smollm2-135m-text")

    Args:
        model: by name (alias, Hub id, folder, GGUF file), or a transformers decoder in eval mode, left as found.
        data: text by name (alias, file, folder, glob, Hub id, or a list of these), or the blocks of `make_blocks`.
        output: where the artifact is going to be saved; the pass keeps its checkpoint beside it
            (`OUTPUT.partial`) and finds it there with `resume`. None: no checkpoints.
        model_id: how the artifact names the model; None: as it was found by name, else "unnamed".
        revision: its commit or version, where it has one; of a model that is given by name it is found.
        centred: PCA of the covariance; False: of the second moment.
        reservoir: tokens whose keys, queries and values are kept.
        seed: of the reservoir's sample, and of the order of several files.
        replace: calibrate although the artifact of another run is at `output`, for `save` to replace it.
        checkpoint_every: seconds between checkpoints, more when saving takes long; 0: after every batch.
        checkpoint_blocks: also after so many blocks.
        progress: called with (blocks done, all).
        codebook_progress: called with (layers done, all), after the pass.
        world: the processes that share the work: batches are dealt to them in turn, or, of a tensor-parallel model,
            each has its heads in all batches. All call this alike and see the same file system.
        named: how what is given by name is loaded and cut: device, dtype, tokenizer, split, text_column, num_tokens,
            seq_len; see `inputs.Named`.

    Returns:
        The artifact in memory, the same on every rank, for `save` to write on rank 0; or the one at `output` when it
        is of this very run.

    Raises:
        KvcalError: model or text not found, text longer than the model's context, NaN activations, an unsupported
            architecture, an interrupted run in the way.

    Warns:
        SmallSampleWarning: the text has too few tokens for the head dim.
    """
    require("faiss", to="calibrate codebooks")  # after the pass: where it is missing, raise before
    if batch_size < 1:
        raise KvcalError(f"batch size {batch_size}: give at least 1")
    if checkpoint_blocks is not None and checkpoint_blocks < 1:
        raise KvcalError(f"a checkpoint every {checkpoint_blocks} blocks: give at least 1")
    if reservoir < 2:
        raise KvcalError(f"reservoir of {reservoir} tokens: give at least 2")
    if revision is not None and isinstance(model, (str, os.PathLike)):
        raise KvcalError(
            f"revision {revision!r}: has no meaning beside a named model: write {os.fspath(model)}@{revision}"
        )
    given = load_inputs(model, data, named, seed)
    model, blocks = given.model, given.blocks
    if model.training:
        raise KvcalError(
            "the model is in training mode, where dropout makes every run another: call model.eval() first"
        )
    check_capture(model)
    check_seq_len(blocks.seq_len, model.config)
    output = Path(output) if output is not None else None
    if output is not None:
        check_output(output)
    if progress:
        progress(0, len(blocks))
    names = (model_id or given.id, revision or given.revision)
    identity = ModelIdentity(*names, fingerprint(model.config), whole_weights_sha256(model))
    text = {
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
    run = _agreed(world, run_id(dataclasses.asdict(identity), text, settings))
    if output is not None and world.agree(has_content(output)):
        found = _there(output, identity, text, settings, replace)
        if found is not None:
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
        data={"source": blocks.source, **text},
        settings=settings,
        versions=versions(),
        stages={name: Stage(stage_tensors) for name, stage_tensors in tensors.items()},
    )
    if world.first:
        warn_if_small(found)
    if not found.full_layers:  # where all layers have a sliding window, nothing decodes with a codebook
        return found
    return codebook(found, report=False, progress=codebook_progress, world=world)


def save(
    artifact: Artifact,
    output: str | os.PathLike[str],
    extras: dict[str, bytes] | None = None,
    *,
    replace: bool = False,
) -> Artifact:
    """Write a calibrated artifact and drop the checkpoint of its run.

    Args:
        replace: take the place of another artifact at `output`, whose plan and figures go, too.
    """
    saved = artifacts.save(artifact, output, extras, replace=replace)
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


def _there(
    output: Path, identity: ModelIdentity, data: dict[str, Any], settings: dict[str, Any], replace: bool
) -> Artifact | None:
    """The artifact at `output` if it is of this run; None: of another, or damaged, and to be replaced."""
    if not replace:
        return _same_run(output, identity, data, settings)
    check_replaceable(output)
    try:
        return _same_run(output, identity, data, settings)
    except KvcalError:
        return None


def _same_run(output: Path, identity: ModelIdentity, data: dict[str, Any], settings: dict[str, Any]) -> Artifact:
    found = artifacts.load(output)
    if found.slim_of is not None:
        raise KvcalError(f"{output}: holds a slim artifact: choose another --output, or add --force to replace it")
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
            "choose another --output, or add --force to replace it"
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
