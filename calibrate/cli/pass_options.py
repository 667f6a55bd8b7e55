"""The calibration pass as commands use it: its options, and from them an artifact on disk."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from ...artifacts import Artifact
from .output import progress_bar, say, working

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = [
    click.option("--model", "model_spec", metavar="MODEL", help="Alias, Hub id with optional @revision, or folder."),
    click.option(
        "--data", "data_spec", metavar="DATA", help="Alias, Hub id org/name[:config[:split]], files, folder or glob."
    ),
    click.option("--output", type=click.Path(path_type=Path), help="Folder of the artifact.  [default: MODEL-DATA]"),
    click.option(
        "--num-tokens",
        type=click.IntRange(1),
        default=131072,
        show_default=True,
        help="Tokens to run, BOS and separators included.",
    ),
    click.option("--seq-len", type=click.IntRange(2), default=2048, show_default=True, help="Tokens per block."),
    click.option(
        "--batch-size", type=click.IntRange(1), help="Blocks per forward pass.  [default: 1 on CPU, 4 on CUDA]"
    ),
    click.option("--split", help="Split of the data set, e.g. train."),
    click.option("--seed", type=int, default=0, show_default=True, help="Seed of the reservoir sample."),
    click.option(
        "--reservoir", type=click.IntRange(2), default=4096, show_default=True, help="Tokens to keep a sample of."
    ),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
    click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16."),
    click.option("--uncentred", is_flag=True, help="PCA of the second moment instead of the covariance."),
    click.option(
        "--resume",
        is_flag=True,
        help="Continue an interrupted run of the same settings (saved every minute, and on Ctrl-C).",
    ),
]


@dataclass(frozen=True)
class PassOptions:
    """What `pass_options` collects; the fields are the options."""

    model_spec: str | None
    data_spec: str | None
    output: Path | None
    num_tokens: int
    seq_len: int
    batch_size: int | None
    split: str | None
    seed: int
    reservoir: int
    device: str
    dtype: str
    uncentred: bool
    resume: bool

    def output_folder(self) -> Path:
        return self.output or Path(f"{_slug(self.model_spec or '')}-{_slug(self.data_spec or '')}")


def pass_options(command: Command) -> Command:
    """Add the options of the calibration pass to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def run_pass(options: PassOptions) -> Artifact:
    """Load model and text, calibrate, save: the artifact at `options.output_folder()`."""
    from ..blocks import make_blocks
    from ..card import card_files
    from ..checkpoint import Checkpoint
    from ..data import open_data
    from ..models import check_seq_len, load_model
    from ..one_pass import calibrate, check_output, save

    if options.model_spec is None or options.data_spec is None:
        raise click.UsageError("give both --model and --data, e.g. --model demo --data stdlib")
    output = options.output_folder()
    check_output(output)
    if options.resume and not Checkpoint.beside(output, "").exists():
        say(f"no interrupted run beside {output}: starting from the beginning")
    with working("finding the text"):
        data = open_data(options.data_spec, options.split)
    with working("loading the model"):
        loaded = load_model(options.model_spec, device=options.device, dtype=options.dtype)
    check_seq_len(options.seq_len, loaded.model.config)
    with working("reading and tokenising the text"):
        blocks = make_blocks(
            data, loaded.tokenizer, num_tokens=options.num_tokens, seq_len=options.seq_len, source=data.source
        )
    if blocks.ids.numel() < options.num_tokens:
        say(f"only {int(blocks.attended.sum())} tokens there, using all of them ({options.num_tokens} asked for)")
    with progress_bar("calibrating") as progress:
        artifact = calibrate(
            loaded.model,
            blocks,
            output=output,
            model_id=loaded.source.id,
            revision=loaded.source.revision,
            centred=not options.uncentred,
            reservoir=options.reservoir,
            seed=options.seed,
            batch_size=options.batch_size or (1 if loaded.model.device.type == "cpu" else 4),
            resume=options.resume,
            progress=progress,
        )
    if artifact.folder is not None:
        say(f"{output}: already calibrated with this model, text and settings")
        return artifact
    with working("writing"):
        return save(artifact, output, card_files(artifact))


def _slug(spec: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", Path(spec).name if "/" in spec else spec).strip("-.") or "artifact"
