from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ...artifacts.places import check_new_file
from ..defaults import PLAN_BYTES
from .completion import complete_method, complete_tasks
from .data_options import data_options, say_left
from .evaluation_lines import say_calibration_text, say_short_blocks
from .loading import load_calibrated
from .options import artifact_argument, device_option, dtype_option, model_option
from .output import NewFile, json_option, print_result, progress_bar, say, working
from .plan_table import print_plan, say_warnings
from .plan_work import open_kept
from .prompt_options import words
from .types import TokenCount


def _is_plan(path: Path) -> bool:
    from ...runtime.planned import is_plan

    return is_plan(path)


def _is_kept(path: Path) -> bool:
    from ..planning.kept import is_kept

    return is_kept(path)


@click.command("plan")
@artifact_argument()
@model_option(default="the artifact's")
@data_options("Measure on this text, other than the artifact's", "heldout of stdlib")
@click.option(
    "--bytes",
    "budget",
    type=click.FloatRange(0, 1, min_open=True),
    show_default=str(PLAN_BYTES),
    help="Read this share, per step and sequence, of what dense attention reads in the layers with full attention; "
    "what layers with a sliding window read counts in neither.",
)
@click.option(
    "--quality",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Find instead the fewest bytes that keep full's perplexity over the plan's at this or above, e.g. 0.99.",
)
@click.option(
    "--method",
    metavar="NAME",
    default="spectral",
    shell_complete=complete_method,
    help="Plan for this method, e.g. loki or clusterkv.",
)
@click.option("--prefix", type=TokenCount(32), default="1k", help="Plan for contexts of this many tokens.")
@click.option("--windows", type=click.IntRange(1), default=4, help="Measure on this many pieces of text.")
@click.option("--check-windows", type=click.IntRange(1), default=8, help="Check the plan on this many others.")
@click.option("--continuation", type=TokenCount(17), default=128, help="Decode this many tokens in a check.")
@click.option(
    "--tasks",
    metavar="NAMES",
    default="perplexity,passkey,multikey",
    shell_complete=complete_tasks,
    help="Check on these tasks, a comma list; what full cannot answer is left out, the last is also measured on.",
)
@click.option("--episodes", type=click.IntRange(1), default=10, help="Ask this many questions of each task in a check.")
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=8,
    help="Decode this many sequences together, --check-windows at most: they share codebooks and the maps of a basis.",
)
@click.option(
    "-o",
    "--output",
    type=NewFile(_is_plan, "a plan"),
    show_default="plan.json in ARTIFACT",
    help="Write the plan to this file.",
)
@click.option("--seed", type=int, default=0, help="Draw the questions by this seed.")
@device_option()
@dtype_option()
@json_option
def plan_command(
    artifact: Path,
    model_spec: str | None,
    data_spec: tuple[str, ...],
    split: str | None,
    text_column: str | None,
    budget: float | None,
    quality: float | None,
    method: str,
    windows: int,
    check_windows: int,
    batch_size: int,
    output: Path | None,
    device: str,
    dtype: str,
    as_json: bool,
    tasks: str,
    episodes: int,
    **prompt_options: Any,
) -> None:
    """Spend a budget of bytes where it buys most.

    A plan has settings for every layer. Of several such plans, and of settings that are the same everywhere, it is the
    one that moves the model's predictions least when it decodes.

    Written to ARTIFACT as plan.json, which `compress(model, artifact)` then decodes with, and `--method plan` of
    `calibrate evaluate`. What was measured is kept beside it in plan.measured.json: another --bytes measures nothing
    again, and an interrupted command goes on.

    \b
    Example:
      calibrate plan mistral-7b-wikitext --data wikitext:wikitext-2-raw-v1:test --bytes 0.0625
    """
    from ...artifacts import load
    from ...runtime.planned import FILE, has_plan
    from ..data import open_data
    from ..evaluation.prompts import make_prompts
    from ..evaluation.protocol import check_lengths
    from ..evaluation.tasks.names import parse_tasks
    from ..models import max_context
    from ..planning import floor
    from ..planning.body import plan_body
    from ..planning.kept import beside
    from ..planning.make import Reporting, make, write_plan
    from ..planning.prompts import QUESTIONS
    from ..planning.settings import check_fitted, check_method
    from ..planning.subject import Subject

    if not data_spec:
        raise click.UsageError("give --data: text that the artifact was not calibrated on, e.g. stdlib --split heldout")
    if budget is not None and quality is not None:
        raise click.UsageError("--bytes and --quality: give one of them")
    budget = PLAN_BYTES if budget is None else budget
    batch_size = min(batch_size, check_windows)  # a check decodes batches of the size planned for
    asked = parse_tasks(words(tasks))
    if "perplexity" not in asked:
        raise click.UsageError("a plan is measured on text: let perplexity be among --tasks")
    check_method(method)
    with working("checking hashes"):
        found = load(artifact)
    path = output or artifact / FILE
    if output is None:
        check_new_file(path, _is_plan, "a plan")
    check_new_file(beside(path), _is_kept, "what a plan was made from")
    check_fitted(method, found, str(artifact))
    with working("finding the text"):
        data = open_data(data_spec, split, text_column=text_column, seed=prompt_options["seed"])
    loaded = load_calibrated(found, model_spec, device=device, dtype=dtype)
    prefix, read_dtype = prompt_options["prefix"], loaded.model.dtype
    if quality is None and found.full_layers:
        with working("reckoning what is read at least"):
            least = floor.floor(found, method, prefix, batch_size, read_dtype)
        floor.check(least, budget, prefix, batch_size, method, max_context(loaded.model.config))
    with working("reading and tokenising the text"):
        prompts = make_prompts(
            data,
            loaded.tokenizer,
            windows=windows + check_windows,
            tasks=asked,
            episodes=episodes + QUESTIONS,
            **prompt_options,
            name=str(data.source["id"]),
        )
    say_left(prompts.source)
    check_lengths(prompts, loaded.model)
    kept = open_kept(beside(path), found, loaded, prompts, windows=windows, batch_size=batch_size)
    subject = Subject(loaded.model, found, loaded.tokenizer, batch_size, kept)
    made = make(subject, prompts, method, windows, budget, quality, Reporting(working, progress_bar, say))
    say_calibration_text(found, prompts.source)
    say_short_blocks(found, prompts, [{"method": method}])
    how = {
        "method": method,
        "budget": {"bytes": budget} if quality is None else {"quality": quality},
        "data": prompts.source,
        "model": loaded.source.id,
        "dtype": str(read_dtype).removeprefix("torch."),
        "windows": windows,
        "check_windows": check_windows,
        "batch_size": batch_size,
        "tasks": asked,
        "episodes": episodes,
        **prompt_options,
    }
    body = plan_body(made, how)
    if output is None and has_plan(found):
        say(f"{path}: replaces the plan that was there")
    write_plan(path, body)
    say_warnings(body)
    print_result(as_json, body, lambda: print_plan(body), path)
    if output is None and not as_json:
        say(f"{path}: compress(model, artifact) decodes with it")
