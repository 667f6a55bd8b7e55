from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ...artifacts import Artifact, KvcalError, load
from ..distributed import World
from .data_options import data_options, say_left
from .evaluation_lines import say_calibration_text, say_low_scores
from .evaluation_table import print_results
from .job import one_job
from .output import NewFile, json_option, plot_option, print_json, progress_bar, say, working, write_plot


def _are_results(path: Path) -> bool:
    from ..evaluation.results_file import are_results

    return are_results(path)


@click.command("evaluate")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--model", "model_spec", metavar="MODEL", help="Alias, Hub id or folder.  [default: the artifact's]")
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
@click.option(
    "--prefix", type=click.IntRange(2), default=1024, show_default=True, help="Tokens that are prefilled densely."
)
@click.option(
    "--continuation", type=click.IntRange(2), default=256, show_default=True, help="Tokens decoded after them."
)
@click.option("--windows", type=click.IntRange(1), default=8, show_default=True, help="Pieces of text for perplexity.")
@click.option(
    "--tasks", default="perplexity,passkey,multikey", show_default=True, help="Comma list of what to measure."
)
@click.option("--lengths", help="Comma list of prefix lengths of the recall tasks.  [default: --prefix]")
@click.option(
    "--episodes", type=click.IntRange(1), default=20, show_default=True, help="Questions per recall task and length."
)
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Rows decoded together.")
@click.option(
    "--question",
    type=click.Choice(["decoded", "prefilled"]),
    default="decoded",
    show_default=True,
    help="How a task's question is read: token by token through the cache, or with the context in the prefill.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of facts, their places and their fillers.")
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
    tasks: str,
    lengths: str | None,
    device: str,
    dtype: str,
    batch_size: int,
    question: str,
    output: Path | None,
    compare: tuple[Path, ...],
    plot: Path | None,
    as_json: bool,
    world: World,
    **prompt_options: Any,
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
    from ..data import open_data
    from ..evaluation.figure import evaluation_figure
    from ..evaluation.grid import check_grid
    from ..evaluation.prompts import make_prompts
    from ..evaluation.protocol import check_lengths, evaluate
    from ..evaluation.results import Results
    from ..evaluation.results_file import compared_rows
    from ..models import load_model

    if not data_spec:
        raise click.UsageError("give --data: text that the artifact was not calibrated on, e.g. stdlib --split heldout")
    grid = _grid(methods, rank, keep, assignments)
    prompt_options |= {"tasks": _words(tasks), "lengths": _numbers("--lengths", lengths)}
    with working("checking hashes"):
        found = load(artifact)
    world.agree_on({"content of ARTIFACT": str(found.content_hash)})
    with working("finding the text"):
        data = open_data(data_spec, split, text_column=text_column, seed=prompt_options["seed"])
    with working("loading the model"):
        loaded = load_model(model_spec or found.model.id, device=device, dtype=dtype)
        check_weights(found, loaded.model)
    check_grid(grid, loaded.model, found)
    with working("reading and tokenising the text"):
        prompts = make_prompts(data, loaded.tokenizer, **prompt_options, name=str(data.source["id"]))
    say_left(prompts.source)
    check_lengths(prompts, loaded.model)
    prompt_options["question"] = question
    settings = _settings(found, loaded, prompts.source, prompts, batch_size, prompt_options)
    results = Results.open(settings, output) if output is not None and world.first else Results(settings, output)
    if any("bytes_per_step" not in row or "scores" not in row for row in results.rows):
        raise KvcalError(f"{output}: a row lacks what was measured: choose another --output, or remove it")
    results = results.for_rank(world)
    for path in compare:
        compared_rows(settings, {}, path)  # said before the work, not after it
    say_calibration_text(found, prompts.source)
    if results.rows:
        say(f"{output}: {len(results.rows)} settings are there already")
    with progress_bar("decoding") as progress:
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
    world.leave_to_first()
    say_low_scores(rows[0])
    rows += [row for path in compare for row in compared_rows(settings, rows[0], path)]
    if as_json:
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
    return make_grid(_words(methods), parameters)


def check_weights(artifact: Artifact, model: Any) -> None:
    """By weights, too, where they were loaded as they were calibrated: another dtype rounds them to others."""
    from ...runtime import check_model

    calibrated, loaded = artifact.settings.get("dtype"), str(model.dtype).removeprefix("torch.")
    check_model(artifact, model, weights=calibrated == loaded)
    if calibrated != loaded:
        say(f"weights are {loaded}, the artifact's were {calibrated}: only the architecture was compared")


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


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(option: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    words = _words(text)
    if not words or not all(word.isdecimal() for word in words):
        raise KvcalError(f"{option} {text!r}: give whole numbers separated by commas, e.g. 512,1024")
    return [int(word) for word in words]
