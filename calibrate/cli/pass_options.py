"""The calibration pass as commands use it: its options, and from them an artifact on disk."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..defaults import NUM_TOKENS, RESERVOIR
from .data_options import data_options, say_left
from .loading import load_model_of
from .options import device_option, dtype_option, force_option, model_option
from .output import progress_bar, say, working
from .types import TokenCount
from .verbosity import detail

if TYPE_CHECKING:
    import torch

    from ...artifacts import Artifact
    from ..distributed import World

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = [
    model_option(),
    data_options("Calibrate on this text", "train"),
    click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path),
        show_default="MODEL-DATA",
        help="Write the artifact to this folder.",
    ),
    force_option("Replace an artifact of another run that is at --output; nothing but an artifact is ever replaced."),
    click.option(
        "--num-tokens",
        type=TokenCount(),
        default=NUM_TOKENS,
        show_default="128k",
        help="Run this many tokens, BOS and separators included.",
    ),
    click.option(
        "--seq-len",
        type=TokenCount(2),
        show_default="the model's context, 8k at most",
        help="Cut the text into blocks of this many tokens, no fewer than contexts will have.",
    ),
    click.option(
        "--batch-size",
        type=click.IntRange(1),
        show_default="1; on CUDA 8k tokens in all",
        help="Run this many blocks in a forward pass.",
    ),
    click.option(
        "--seed", type=int, default=0, help="Draw the reservoir sample, and the order of several files, by this seed."
    ),
    click.option(
        "--reservoir",
        type=TokenCount(2),
        default=RESERVOIR,
        help="Keep the keys, queries and values of this many sampled tokens.",
    ),
    device_option(),
    dtype_option(),
    click.option("--uncentred", is_flag=True, help="Take PCA of the second moment instead of the covariance."),
    click.option(
        "--device-map",
        help="Spread the model over GPUs, CPU memory and disk with accelerate: auto, balanced, balanced_low_0 or "
        "sequential.",
    ),
    click.option(
        "--max-memory", help="Take at most this much of each device with --device-map, e.g. 0=20GiB,1=20GiB,cpu=64GiB."
    ),
    click.option("--tp", is_flag=True, help="Deal the model's heads, not the blocks, to the processes of torchrun."),
    click.option(
        "--checkpoint-every",
        type=click.FloatRange(0),
        default=60.0,
        help="Save the state after this many seconds, or more when saving takes long.",
    ),
    click.option("--checkpoint-blocks", type=click.IntRange(1), help="Save the state after this many blocks, too."),
    click.option(
        "--resume",
        is_flag=True,
        help="Continue an interrupted run of the same settings from its last saved state, if there is one.",
    ),
]


@dataclass(frozen=True)
class PassOptions:
    """What `pass_options` collects; the fields are the options."""

    model_spec: str | None
    data_spec: tuple[str, ...]
    output: Path | None
    num_tokens: int
    seq_len: int | None
    batch_size: int | None
    split: str | None
    seed: int
    reservoir: int
    device: str
    dtype: str
    uncentred: bool
    resume: bool
    device_map: str | None = None
    max_memory: str | None = None
    tp: bool = False
    checkpoint_every: float = 60.0
    checkpoint_blocks: int | None = None
    text_column: str | None = None
    force: bool = False

    def output_folder(self) -> Path:
        return self.output or Path("-".join(map(_slug, (self.model_spec or "", *self.data_spec[:3]))))


def pass_options(command: Command) -> Command:
    """Add the options of the calibration pass to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def run_pass(options: PassOptions, world: World | None = None) -> Artifact:
    """Load model and text, calibrate, save: the artifact at `options.output_folder()`.

    Returns on rank 0 only; the other ranks' work ends here.

    Args:
        world: the processes that share the work; None: this one alone.
    """
    import matplotlib  # noqa: F401 (the artifact's figure is drawn after the pass: said before it where it cannot be)

    from ...artifacts.writing import has_content
    from ..card import card_files
    from ..checkpoint import Checkpoint
    from ..data import open_data
    from ..distributed import SINGLE
    from ..inputs import cut
    from ..one_pass import calibrate, check_output, save
    from ..placement import input_device
    from ..sample_size import SmallSampleWarning, small_sample

    world = world or SINGLE
    if options.model_spec is None or not options.data_spec:
        raise click.UsageError("give both --model and --data, e.g. --model demo --data stdlib")
    output = options.output_folder()
    check_output(output)
    if options.resume and not Checkpoint.beside(output, "").exists() and not has_content(output):
        say(f"no interrupted run beside {output}: starting from the beginning")
    with working("finding the text"):
        data = open_data(options.data_spec, options.split, text_column=options.text_column, seed=options.seed)
    loaded = load_model_of(
        options.model_spec, device=options.device, dtype=options.dtype, placement=_placement(options, world)
    )
    with working("reading and tokenising the text"):
        blocks = cut(data, loaded.tokenizer, loaded.model, options.num_tokens, options.seq_len)
    say_left(blocks.source)
    detail(f"text {data.source['id']}: {len(blocks)} blocks of {blocks.seq_len} tokens, sha256 {blocks.content_hash}")
    if blocks.ids.numel() < options.num_tokens:
        say(f"only {int(blocks.attended.sum())} tokens there, using all of them ({options.num_tokens} asked for)")
    with progress_bar("calibrating") as progress, warnings.catch_warnings():
        warnings.simplefilter("ignore", SmallSampleWarning)  # said below, in one line
        artifact = calibrate(
            loaded.model,
            blocks,
            output=output,
            model_id=loaded.source.id,
            revision=loaded.source.revision,
            centred=not options.uncentred,
            reservoir=options.reservoir,
            seed=options.seed,
            batch_size=options.batch_size or _batch_size(input_device(loaded.model), blocks.ids.shape[1]),
            resume=options.resume,
            replace=options.force,
            checkpoint_every=options.checkpoint_every,
            checkpoint_blocks=options.checkpoint_blocks,
            progress=progress,
            codebook_progress=lambda done, total: progress(len(blocks), len(blocks), note=f"codebooks {done}/{total}"),
            world=world,
        )
    world.leave_to_first()
    if artifact.folder is not None:
        nothing = ": nothing is left to resume" if options.resume else ""
        say(f"{output}: already calibrated with this model, text and settings{nothing}")
        return artifact
    if problem := small_sample(artifact):
        say(f"{output}: {problem}")
    with working("writing"):
        return save(artifact, output, card_files(artifact), replace=options.force)


def _batch_size(device: torch.device, seq_len: int) -> int:
    return 1 if device.type == "cpu" else max(1, 8192 // seq_len)


def _placement(options: PassOptions, world: World) -> Callable[[Any], dict[str, Any]] | None:
    """How the model is to lie on devices; None: whole on one."""
    from ..placement import device_map_options, tensor_parallel_options

    if options.tp and options.device_map:
        raise click.UsageError("give either --tp or --device-map, not both")
    if options.max_memory and not options.device_map:
        raise click.UsageError("--max-memory goes with --device-map")
    if options.tp:
        if world.size == 1:
            raise click.UsageError("--tp needs several processes: torchrun --nproc-per-node N -m kvcal.calibrate pca …")
        if options.device != "auto":
            raise click.UsageError("--tp chooses the devices: drop --device")
        return lambda config: tensor_parallel_options(config, world.size)
    if options.device_map:
        if world.size > 1:
            raise click.UsageError("--device-map takes all devices of the machine for one process: drop torchrun")
        output = options.output_folder().absolute()
        found = device_map_options(
            options.device_map, options.max_memory, str(output.with_name(f"{output.name}.offload"))
        )
        return lambda config: found
    return None


def _slug(spec: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", Path(spec).name if "/" in spec else spec).strip("-.") or "artifact"
