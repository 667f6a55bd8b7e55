from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ...artifacts import Artifact, KvcalError, load
from ..distributed import World
from .data_options import data_options
from .evaluation_lines import low_score_lines, say_calibration_text, say_short_blocks
from .evaluation_table import print_results
from .job import one_job
from .loading import load_calibrated
from .output import NewFile, json_option, plot_option, print_json, progress_bar, say, working, write_plot
from .prompt_options import PromptOptions, prompt_options, words


def _are_results(path: Path) -> bool:
    from ..evaluation.results_file import are_results

    return are_results(path)


@click.command("evaluate")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--model", "model_spec", metavar="MODEL", help="Alias, Hub id, folder or GGUF file.  [default: the artifact's]"
)
@data_options("Unseen text", "heldout of stdlib")
@click.option(
    "--method",
    "methods",
    default="loki",
    show_default=True,
    help="Comma list, also of cla and cla+METHOD; `full` is always run.",
)
@click.option("--rank", help="Comma list of fractions (0.25), counts (32) or variance:0.9.  [default: the method's]")
@click.option("--keep", help="Comma list of fractions (0.25) or counts (256) of tokens.  [default: the method's]")
@click.option(
    "--set", "assignments", metavar="NAME=VALUES", multiple=True, help="Any other parameter, e.g. basis=pca,score."
)
@prompt_options
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Rows decoded together.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16.")
@click.option(
    "--output",
    type=NewFile(_are_results, "a results file"),
    help="Results as JSON; a run that finds its own file there goes on.",
)
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
    compare: tuple[Path, ...],
    plot: Path | None,
    as_json: bool,
    world: World,
    **of_prompts: Any,
) -> None:
    """What decoding methods cost in quality and save in bytes, on the same tokens and the same code path.

    A context is prefilled densely; text that follows it, or a question and the model's answer, is decoded token
    by token through each method's cache, and everything is set against `full`. Every mean has its standard
    error, and what was answered to every sample stands beside --output (results.predictions.jsonl).

    \b
    Example:
      calibrate evaluate mistral-7b-wikitext --data wikitext:wikitext-2-raw-v1:test \\
        --method loki,h2o,streaming --keep .25,.125 --output results.json --plot results.png
    """
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
    results = Results.open(settings, output) if output is not None and world.first else Results(settings, output)
    if any("bytes_per_step" not in row or "scores" not in row for row in results.rows):
        raise KvcalError(f"{output}: a row lacks what was measured: choose another --output, or remove it")
    results = results.for_rank(world)
    for path in compare:
        compared_rows(settings, {}, path)  # said before the work, not after it
    say_calibration_text(found, prompts.source)
    say_short_blocks(found, prompts, grid)
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
    except KeyboardInterrupt:
        if output is None:
            raise KvcalError("interrupted: nothing was kept: with --output FILE the same command goes on") from None
        raise
    world.leave_to_first()
    rows += [row for path in compare for row in compared_rows(settings, rows[0], path)]
    if as_json:
        for line in low_score_lines(rows[0]):  # which otherwise stands under the table
            say(line)
        print_json({"settings": settings, "results": rows})
    else:
        print_results(settings, rows)
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
