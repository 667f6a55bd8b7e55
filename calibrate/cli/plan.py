from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ...artifacts import load
from ...artifacts.places import check_new_file
from ...artifacts.writing import write_atomically
from .data_options import data_options, say_left
from .evaluation_lines import say_calibration_text, say_short_blocks
from .loading import load_calibrated
from .output import NewFile, json_option, print_json, progress_bar, say, working
from .plan_table import print_plan
from .prompt_options import words

BYTES = 0.0625


def _is_plan(path: Path) -> bool:
    from ...runtime.planned import is_plan

    return is_plan(path)


@click.command("plan")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--model", "model_spec", metavar="MODEL", help="Alias, Hub id, folder or GGUF file.  [default: the artifact's]"
)
@data_options("Text to measure on, other than the artifact's", "heldout of stdlib")
@click.option(
    "--bytes",
    "budget",
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of dense attention's bytes to read per step and row.  [default: 0.0625]",
)
@click.option(
    "--quality",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Instead: the fewest bytes that keep full's perplexity over the plan's at this or above, e.g. 0.99.",
)
@click.option("--method", default="spectral", show_default=True, help="spectral, loki or clusterkv.")
@click.option(
    "--prefix", type=click.IntRange(32), default=1024, show_default=True, help="Tokens of context to plan for."
)
@click.option("--windows", type=click.IntRange(1), default=4, show_default=True, help="Pieces of text to measure on.")
@click.option("--check-windows", type=click.IntRange(1), default=8, show_default=True, help="Others, to check on.")
@click.option(
    "--continuation", type=click.IntRange(17), default=128, show_default=True, help="Tokens decoded in a check."
)
@click.option(
    "--tasks",
    default="perplexity,passkey,multikey",
    show_default=True,
    help="Comma list of what a check measures; what full cannot answer is left out, the last is also measured on.",
)
@click.option(
    "--episodes", type=click.IntRange(1), default=10, show_default=True, help="Questions of each task in a check."
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Rows decoded together: they share the maps of a basis. At most --check-windows.",
)
@click.option("--output", type=NewFile(_is_plan, "a plan"), help="File of the plan.  [default: plan.json in ARTIFACT]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the questions.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16.")
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
    """Spend a budget of bytes where it buys most: settings for every layer, from the attention error of each.

    Written to ARTIFACT as plan.json, which `compress(model, artifact)` then decodes with, and `--method plan` of
    `calibrate evaluate`.

    \b
    Example:
      calibrate plan mistral-7b-wikitext --data wikitext:wikitext-2-raw-v1:test --bytes 0.0625
    """
    from ...runtime.planned import FILE, has_plan
    from ..data import open_data
    from ..evaluation.grid import FULL
    from ..evaluation.prompts import make_prompts
    from ..evaluation.protocol import check_lengths, evaluate
    from ..evaluation.results import Results
    from ..evaluation.tasks.names import parse_tasks
    from ..planning.plan import check_choice, for_bytes, for_quality, measure_offers, plan_body
    from ..planning.prompts import QUESTIONS, answerable, split_prompts
    from ..planning.settings import grid

    if not data_spec:
        raise click.UsageError("give --data: text that the artifact was not calibrated on, e.g. stdlib --split heldout")
    if budget is not None and quality is not None:
        raise click.UsageError("--bytes and --quality: give one of them")
    budget = BYTES if budget is None else budget
    batch_size = min(batch_size, check_windows)  # what is predicted is checked
    asked = parse_tasks(words(tasks))
    if "perplexity" not in asked:
        raise click.UsageError("a plan is measured on text: let perplexity be among --tasks")
    grid(method, 64, {})  # an unknown method is said before any work
    with working("checking hashes"):
        found = load(artifact)
    path = output or artifact / FILE
    if output is None:
        check_new_file(path, _is_plan, "a plan")
    with working("finding the text"):
        data = open_data(data_spec, split, text_column=text_column, seed=prompt_options["seed"])
    loaded = load_calibrated(found, model_spec, device=device, dtype=dtype)
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
    results, decoding = Results({}), {"tokenizer": loaded.tokenizer, "batch_size": batch_size}
    with working("asking the model itself"):
        _, checked_on = split_prompts(prompts, windows, QUESTIONS)
        (full,) = evaluate(loaded.model, None, checked_on, [FULL], results=results, **decoding)
    prompts, dropped = answerable(full, prompts)
    for task, score in dropped.items():
        say(f"{task}: full itself scores {score:.2f}, too little to plan by: left out")
    measured, checked_on = split_prompts(prompts, windows, QUESTIONS)
    with progress_bar("measuring") as progress:
        offers = measure_offers(loaded.model, found, measured, method, batch_size, progress)

    def check(choice: Any) -> dict[str, Any]:
        with working(f"decoding with {choice.bytes:.4f} of the bytes"):
            return check_choice(loaded.model, found, checked_on, offers, choice, results, **decoding)

    if quality is None:
        choice = for_bytes(offers, budget)
    else:
        choice = for_quality(offers, quality, check)
    say_calibration_text(found, prompts.source)
    say_short_blocks(found, prompts, [{"method": method}])
    how = {
        "method": method,
        "budget": {"quality": quality} if quality is not None else {"bytes": budget},
        "data": prompts.source,
        "model": loaded.source.id,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "windows": windows,
        "check_windows": check_windows,
        "batch_size": batch_size,
        "tasks": asked,
        "episodes": episodes,
        **prompt_options,
    }
    body = plan_body(offers, choice, how, check(choice), dropped)
    if output is None and has_plan(found):
        say(f"{path}: replaces the plan that was there")
    write_atomically(path, (json.dumps(body, indent=1) + "\n").encode())
    if body["warnings"]:
        more = "give a higher --quality" if quality is not None else "give more --bytes"
        say(f"this plan ruins what it was checked on: {'; '.join(body['warnings'])}: {more}, or another --method")
    if as_json:
        print_json(body)
    else:
        print_plan(body)
        read = body["measured"]["bytes"]
        if quality is None and read > budget * 1.02:
            say(f"the check read {read:.4f} of dense attention's bytes, more than the budget of {budget:g}")
        if output is None:
            say(f"{path}: compress(model, artifact) decodes with it")
