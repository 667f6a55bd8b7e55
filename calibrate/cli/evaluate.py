from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...artifacts import KvcalError
from ..interrupts import Interrupted, Terminated
from .completion import complete_methods
from .data_options import data_options
from .evaluation_lines import low_score_lines, say_calibration_text, say_short_blocks, say_unfitted
from .evaluation_table import print_results
from .job import one_job
from .loading import load_calibrated
from .options import artifact_argument, device_option, dtype_option, force_option, model_option
from .output import NewFile, json_option, plot_option, print_result, progress_bar, say, working, write_plot
from .prompt_options import PromptOptions, prompt_options, words

if TYPE_CHECKING:
    from ...artifacts import Artifact
    from ..distributed import World


def _are_results(path: Path) -> bool:
    from ..evaluation.results_file import are_results

    return are_results(path)


@click.command("evaluate")
@artifact_argument()
@model_option(default="the artifact's")
@data_options("Evaluate on this unseen text", "heldout of stdlib")
@click.option(
    "--method",
    "methods",
    metavar="NAMES",
    default="loki",
    shell_complete=complete_methods,
    help="Evaluate these methods, a comma list, also of cla and cla+METHOD; `full` is always run.",
)
@click.option(
    "--rank",
    metavar="VALUES",
    show_default="the method's",
    help="Use these ranks, a comma list of fractions (0.25), counts (32) or variance:0.9.",
)
@click.option(
    "--keep",
    metavar="VALUES",
    show_default="the method's",
    help="Keep these amounts of tokens, a comma list of fractions (0.25) or counts (256).",
)
@click.option(
    "--set",
    "assignments",
    metavar="NAME=VALUES",
    multiple=True,
    help="Set any other parameter of the methods, e.g. basis=pca,score.",
)
@prompt_options
@click.option("--batch-size", type=click.IntRange(1), default=8, help="Decode this many sequences together.")
@device_option()
@dtype_option()
@click.option(
    "-o",
    "--output",
    type=NewFile(_are_results, "a results file"),
    help="Write the results to this JSON file; a run that finds its own file there goes on.",
)
@force_option("Replace results of other settings that are at --output; nothing but results is ever replaced.")
@click.option(
    "--compare",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Also show the rows of this results file of the same model and tokens.",
)
@plot_option
@json_option
@one_job
def evaluate_command(
    artifact: Path,
    model_spec: str | None,
    data_spec: tuple[str, ...],
    split: str | None,
    text_column: str | None,
    methods: str,
    rank: str | None,
    keep: str | None,
    assignments: tuple[str, ...],
    question: str,
    device: str,
    dtype: str,
    batch_size: int,
    output: Path | None,
    force: bool,
    compare: tuple[Path, ...],
    plot: Path | None,
    as_json: bool,
    world: World,
    **of_prompts: Any,
) -> None:
    """Measure what decoding methods cost in quality and save in bytes.

    All of them decode the same tokens by the same code path.

    A context is prefilled densely; text that follows it, or a question and the model's answer, is decoded token
    by token through each method's cache, and everything is set against `full`. Every mean has its standard
    error, and what was answered to every sample stands beside --output (results.predictions.jsonl).

    \b
    Example:
      calibrate evaluate mistral-7b-wikitext --data wikitext:wikitext-2-raw-v1:test \\
        --method loki,h2o,streaming --keep .25,.125 --output results.json --plot results.png
    """
    from ...artifacts import load
    from ..evaluation.figure import evaluation_figure
    from ..evaluation.grid import check_grid
    from ..evaluation.protocol import check_lengths, evaluate
    from ..evaluation.results import Results
    from ..evaluation.results_file import compared_rows

    options = PromptOptions.of(bool(data_spec), **of_prompts)
    grid = _grid(methods, rank, keep, assignments)
    with working("checking hashes"):
        found = load(artifact)
    world.agree_on({"content of ARTIFACT": str(found.content_hash)})
    data = options.find_text(data_spec, split, text_column)
    loaded = load_calibrated(found, model_spec, device=device, dtype=dtype)
    check_grid(grid, loaded.model, found)
    prompts = options.make(data, loaded)
    check_lengths(prompts, loaded.model)
    described = {**options.described, "question": question}
    settings = _settings(found, loaded, prompts.source, prompts, batch_size, described)
    results = (
        Results.open(settings, output, replace=force)
        if output is not None and world.first
        else Results(settings, output)
    )
    if any("bytes_per_step" not in row or "scores" not in row for row in results.rows):
        raise KvcalError(f"{output}: a row lacks what was measured: choose another --output, or remove it")
    results = results.for_rank(world)
    for path in compare:
        compared_rows(settings, {}, path)  # said before the work, not after it
    say_calibration_text(found, prompts.source)
    say_short_blocks(found, prompts, grid)
    say_unfitted(found, grid)
    if results.rows:
        say(f"{output}: {len(results.rows)} settings are there already")
    elif results.unfinished:
        say(f"{output}: goes on with what an interrupted run measured")
    try:
        with progress_bar("decoding", estimate=False) as progress:
            rows = evaluate(
                loaded.model,
                found,
                prompts,
                grid,
                tokenizer=loaded.tokenizer,
                question=question,
                batch_size=batch_size,
                results=results,
                progress=progress,
                say=say,
                world=world,
            )
    except KeyboardInterrupt as error:
        number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
        kept = "nothing was kept: with --output FILE the same command goes on"
        if output is not None:
            kept = f"what was measured is in {output}: repeat the command to go on"
        raise Interrupted(f"interrupted: {kept}", number) from None
    world.leave_to_first()
    rows += [row for path in compare for row in compared_rows(settings, rows[0], path)]
    if as_json:
        for line in low_score_lines(rows[0]):  # which otherwise stands under the table
            say(line)
    print_result(as_json, {"settings": settings, "results": rows}, lambda: print_results(settings, rows))
    if plot is not None:
        write_plot(plot, evaluation_figure(settings, rows))


def _grid(methods: str, rank: str | None, keep: str | None, assignments: Sequence[str]) -> list[dict[str, Any]]:
    from ..evaluation.grid import make_grid, parse_assignments, parse_values

    parameters = parse_assignments(assignments)
    for name, text in (("rank", rank), ("keep", keep)):
        if text is not None:
            if name in parameters:
                raise KvcalError(f"--{name} and --set {name}: give one of them")
            parameters[name] = parse_values(text)
    return make_grid(words(methods), parameters)


def _settings(
    artifact: Artifact, loaded: Any, source: Any, prompts: Any, batch_size: int, options: dict[str, Any]
) -> dict[str, Any]:
    """All that rows of one results file have in common."""
    from ...artifacts import weights_sha256
    from ..one_pass import versions

    return {
        "model": loaded.source.id,
        "weights_sha256": weights_sha256(loaded.model),
        "artifact": artifact.content_hash,
        "data": source,
        **{name: list(value) if isinstance(value, tuple) else value for name, value in options.items()},
        "tokens_sha256": prompts.tokens_sha256,
        "batch_size": batch_size,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": _device_name(loaded.model.device),
        "versions": versions(),
    }


def _device_name(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device.type)
