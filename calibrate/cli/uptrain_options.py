"""`calibrate share --uptrain`: its options, and the training that they describe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .data_options import data_options, say_left
from .loading import load_calibrated
from .options import device_option, dtype_option
from .output import print_lines, print_table, progress_bar, say, working
from .types import TokenCount

if TYPE_CHECKING:
    from ...artifacts import Artifact
    from ..blocks import TokenBlocks
    from ..cla.training_state import Record
    from ..data import TextData

LOSS_FIGURE = "uptraining.png"
_TENTHS = {"first tenth": "first_losses", "last tenth": "last_losses"}
Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = [
    click.option("--uptrain", is_flag=True, help="Train the shared model; its weights go into the stage `cla`."),
    data_options("Train on this text", "train"),
    click.option(
        "--steps",
        type=click.IntRange(0),
        help="Train for this many steps; --uptrain needs it. With 0 it is only fitted where a training would start.",
    ),
    click.option("--lr", type=float, default=1e-4, help="Let AdamW's learning rate rise to this."),
    click.option(
        "--distill",
        type=float,
        default=1.0,
        help="Let KL(original ‖ shared) be this part of the loss, from 0 to 1; the rest is the next-token loss.",
    ),
    click.option(
        "--train",
        type=click.Choice(["shared", "attention", "all"]),
        default="shared",
        help="Train the shared projections and the reading layers' queries and norms, or all attention and norms, or "
        "all weights.",
    ),
    click.option(
        "--pool",
        type=click.Choice(["fitted", "mean", "first"]),
        default="fitted",
        help="Start from projections fitted on the text, from their mean, or from the first layer's.",
    ),
    click.option("--batch-size", type=click.IntRange(1), default=8, help="Take this many blocks in a step."),
    click.option(
        "--seq-len",
        "--block-size",
        "seq_len",
        type=TokenCount(2),
        show_default="as in ARTIFACT's pass, 2k at most",
        help="Cut the text into blocks of this many tokens.",
    ),
    click.option(
        "--warmup",
        type=click.IntRange(0),
        show_default="a twentieth",
        help="Reach the peak learning rate after this many steps.",
    ),
    click.option("--seed", type=int, default=0, help="Draw the order of files and blocks, and dropout, by this seed."),
    click.option(
        "--checkpoint-every", type=click.IntRange(1), default=100, help="Save the state after this many steps."
    ),
    click.option("--resume", is_flag=True, help="Go on with an interrupted training of the same settings."),
    click.option(
        "--continue", "more", is_flag=True, help="Start from the trained weights that ARTIFACT has, and replace them."
    ),
    device_option("the training"),
    dtype_option("Train in this dtype: auto, float32 (fp32), or bfloat16 (bf16) with float32 copies."),
]


@dataclass(frozen=True)
class UptrainOptions:
    """What `uptrain_options` collects; the fields are the options."""

    uptrain: bool
    data_spec: tuple[str, ...]
    split: str | None
    text_column: str | None
    steps: int | None
    lr: float
    distill: float
    train: str
    pool: str
    batch_size: int
    seq_len: int | None
    warmup: int | None
    seed: int
    checkpoint_every: int
    resume: bool
    more: bool
    device: str
    dtype: str

    @classmethod
    def take(cls, options: dict[str, Any]) -> UptrainOptions:
        """Out of a command's options. Raises click.UsageError: training options without --uptrain, or too few."""
        context = click.get_current_context()
        found = cls(**{field.name: options.pop(field.name) for field in fields(cls)})
        default = click.core.ParameterSource.DEFAULT
        given = [field.name for field in fields(cls) if context.get_parameter_source(field.name) != default]
        if not found.uptrain and given:
            name = {"data_spec": "data", "more": "continue"}.get(given[0], given[0]).replace("_", "-")
            raise click.UsageError(f"--{name} is for training: give --uptrain, too")
        if found.uptrain and (not found.data_spec or found.steps is None):
            raise click.UsageError(
                "--uptrain needs text and length: give --data and --steps, e.g. --data stdlib --steps 500"
            )
        return found


def uptrain_options(command: Command) -> Command:
    """Add the options of uptraining to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def run_uptraining(
    artifact: Artifact, folder: Path, model_spec: str, options: UptrainOptions, overwrite: bool
) -> tuple[Artifact, list[Record]]:
    """Train the sharing of the stage `cla` and save it there: (the artifact, the history of the training)."""
    from ...artifacts import save
    from ...runtime.cla.method import stage_map
    from ..card import card_files
    from ..cla.figures import loss_figure
    from ..cla.refit import refit_keys
    from ..cla.requested import refuse_to_lose
    from ..cla.start import FITTED, START_TOKENS, starting_weights
    from ..cla.training_state import TrainingState
    from ..cla.uptrained_stage import earlier_training, finished_run, with_uptraining
    from ..cla.uptraining import Uptraining, check_trainable, run_settings, uptrain
    from ..data import open_data
    from ..plots import plain_name

    assert options.data_spec and options.steps is not None
    names = {field.name for field in fields(Uptraining)}
    training = Uptraining(**{name: value for name, value in vars(options).items() if name in names})
    sharing_map, earlier = stage_map(artifact), earlier_training(artifact) if options.more else None
    with working("finding the text"):
        data = open_data(options.data_spec, options.split, text_column=options.text_column, seed=options.seed)
    loaded = load_calibrated(artifact, model_spec, device=options.device, dtype=options.dtype)
    seq_len = options.seq_len or min(2048, int(artifact.data["seq_len"]))
    check_trainable(loaded.model, sharing_map, training, seq_len, options.pool, earlier)
    fits = options.pool == FITTED and not earlier
    tokens = training.steps * training.batch_size * seq_len
    with working("reading and tokenising the text"):
        blocks = _blocks(data, loaded.tokenizer, tokens, seq_len, START_TOKENS if fits else 0)
        refit_blocks = _refit_blocks(artifact, data, loaded.tokenizer, blocks)
    say_left(blocks.source)
    state = TrainingState.beside(folder, "")
    run = run_settings(loaded.model, blocks, sharing_map, training, options.pool, earlier)["run"]
    runs = [run]
    if options.resume and earlier is not None and not state.exists() and earlier.settings.get("earlier"):
        # --continue has ended: repeated to resume it, it is the training that is there, not another one after it.
        before = replace(earlier, settings=earlier.settings["earlier"])
        runs.append(run_settings(loaded.model, blocks, sharing_map, training, options.pool, before)["run"])
    if finished_run(artifact) in runs:
        nothing = ": nothing is left to resume" if options.resume else ""
        say(f"{folder}: already uptrained with this model, text and settings{nothing}")
        state.remove()  # a kill after saving may have left it
        return artifact, []
    refuse_to_lose(artifact, overwrite or options.more)
    if options.resume and not state.exists():
        say(f"no interrupted uptraining beside {folder}: starting from the beginning")
    if not options.resume:
        state.refuse_to_lose()
    start = None
    if fits:
        with progress_bar("fitting the start") as fitting:
            resumed = options.resume and state.exists()
            start = starting_weights(loaded.model, sharing_map, blocks, FITTED, resumed, fitting)
    with training_bar() as progress:
        uptrained = uptrain(
            loaded.model,
            blocks,
            sharing_map,
            training,
            pool=options.pool,
            earlier=earlier,
            beside=folder,
            resume=options.resume,
            checkpoint_every=options.checkpoint_every,
            progress=progress,
            start=start,
        )
    with progress_bar("refitting key bases") as refitting:
        bases = refit_keys(
            loaded.model,
            sharing_map,
            uptrained.weights,
            refit_blocks,
            centred=bool(artifact.settings.get("centred", True)),
            progress=refitting,
        )
    trained = with_uptraining(artifact, uptrained, bases)
    history = list(uptrained.history)
    title = f"{plain_name(artifact.model.id)}, groups {sharing_map}, on {plain_name(data.source['id'])}"
    figures = {LOSS_FIGURE: loss_figure(history, title)} if history else {}
    with working("writing"):
        saved = save(trained, folder, {**card_files(trained), **figures})
        if not figures:
            remove_loss_figure(folder)
    state.remove()
    return saved, history


def remove_loss_figure(folder: Path) -> None:
    """That of a training whose weights the artifact does not have any more."""
    (folder / LOSS_FIGURE).unlink(missing_ok=True)


def print_uptraining(settings: dict[str, Any]) -> None:
    """Losses of the first and the last tenth of the steps."""
    done = settings["uptraining"]
    names = list(done["first_losses"])
    if not names:
        print_lines(f"groups {settings['groups']}: shared projections were fitted to the text, nothing was trained")
        return
    rows = [[when, *(f"{done[key][name]:.4f}" for name in names)] for when, key in _TENTHS.items()]
    after = " more" if done.get("earlier") else ""
    title = f"groups {settings['groups']}: {done['steps']}{after} steps, {done['train']} weights, lr {done['lr']:g}"
    print_table(title, ["steps", *(name.replace("_", " ") for name in names)], rows)
    print_lines("nats per token on the training text; kl: of the shared model's predictions from the original's")


def _blocks(data: TextData, tokenizer: Any, tokens: int, seq_len: int, least: int) -> TokenBlocks:
    """As much text as a training of so many tokens sees, or `least`."""
    from ..blocks import make_blocks

    blocks = make_blocks(data, tokenizer, num_tokens=max(tokens, least), seq_len=seq_len, source=data.source)
    if blocks.ids.numel() < tokens:
        say(f"{int(blocks.attended.sum())} tokens of text for a training of {tokens}: each is seen several times")
    return blocks


def _refit_blocks(artifact: Artifact, data: TextData, tokenizer: Any, training: TokenBlocks) -> TokenBlocks:
    """As much text, in blocks as long, as the artifact's pass had, REFIT_TOKENS at most; the training's blocks where
    there is less."""
    from ...artifacts import KvcalError
    from ..blocks import make_blocks
    from ..cla.refit import REFIT_TOKENS

    seq_len = artifact.data["seq_len"]
    tokens = min(artifact.data["blocks"] * seq_len, max(seq_len, REFIT_TOKENS))
    try:
        return make_blocks(data, tokenizer, num_tokens=tokens, seq_len=seq_len, source=data.source)
    except KvcalError:
        return training


@contextmanager
def training_bar() -> Iterator[Callable[[int, int, float], None]]:
    """A progress bar, or lines for a log, with the loss."""
    with progress_bar("uptraining") as update:
        yield lambda done, total, loss: update(done, total, f"loss {loss:.3f}" if done else "")
