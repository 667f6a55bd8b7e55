"""What a method costs in quality and saves in bytes: decoding through the real path.

A context is prefilled densely, once for all settings; each setting's cache takes those tokens over, and decodes from
them: a given continuation token by token, or a question and then, greedily, its answer (see `prefilled`). `full` goes
the same way and is what the others are compared with.

Settings of `cla` change the model, so each sharing prefills for itself. Their perplexity and scores are compared with
those of `full` in the model as it is; the error of their attention is against dense attention of the shared model, so
it is that of the method after the "+", and not what sharing costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...artifacts import Artifact, KvcalError
from ...runtime.integration import rotation
from ...runtime.integration.layer import full_attention_layers
from ...runtime.wrapped import unwrapped
from ..distributed import SINGLE, World
from ..models import max_context
from .grid import FULL, Setting, by_sharing, check_grid, decoding, key_of, recorded, sharing
from .measurements import Batch, Measured, batches, most_steps, samples_of
from .prefilled import DECODED, PREFILLED, QUESTIONS, prefill
from .progress_report import Progress, ProgressReport
from .prompts import Prompts
from .results import Results
from .rows import Rows, result_row
from .schedule import Part


def evaluate(
    model: Any,
    artifact: Artifact | None,
    prompts: Prompts,
    grid: Sequence[Setting],
    *,
    tokenizer: Any = None,
    question: str = DECODED,
    batch_size: int = 8,
    results: Results | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    world: World = SINGLE,
) -> Rows:
    """Measure every setting on every prompt.

    Args:
        model: a transformers causal language model in eval mode.
        grid: from `make_grid`; `full` is run first whether it is there or not.
        tokenizer: of the model; needed where `prompts` have tasks, whose answers are text.
        question: "decoded" or "prefilled": see `prefilled`.
        batch_size: rows that are decoded together; `ms_per_step` is the time of a step of all of them.
        results: what earlier runs found, which is not measured again; kept up to date, and on the disk
            when it has a path.
        progress: called with (decode steps done, all, how long the others will take), of this rank's share.
        say: called once or twice with a line that says how long it will take.
        world: the processes that share the work, with the same `results`; each measures some settings on some batches.

    Returns:
        A row for each setting, in the order of the grid: see `result_row`. The same on every rank.

    Raises:
        KvcalError: a setting that this model or artifact does not allow, or prompts beyond the model's context;
            before anything is run.
    """
    model = unwrapped(model)
    grid = [FULL, *(setting for setting in grid if setting != FULL)]
    results = results or Results({})
    if question not in QUESTIONS:
        raise KvcalError(f"question {question!r}: choose between {' and '.join(QUESTIONS)}")
    if prompts.tasks and tokenizer is None:
        raise KvcalError("tasks are scored as text: give the model's tokenizer")
    check_lengths(prompts, model)
    check_grid(grid, model, artifact)
    missing = [setting for setting in grid if results.row(setting) is None]
    everything = batches(prompts, batch_size, even=question == PREFILLED and _has_windows(model))
    todo = [(batch, setting) for batch in everything for setting in missing]
    work = _share([(batch, setting) for batch, setting in todo if batch.key not in results.partial(setting)], world)
    parts = [_part(prompts, batch, settings, question == DECODED) for batch, settings in work]
    report = ProgressReport(parts, len({batch.task for batch, _ in work}), progress, say)
    layers = int(_text_config(model).num_hidden_layers)
    recordings: dict[str, dict[str, list[Any]]] = {}
    results.write()  # a disk that cannot be written to is found now
    report.show()
    for batch, settings in work:
        for alike in by_sharing(settings):
            with sharing(model, artifact, alike[0]):
                done = report.schedule.prefilling()
                if (key := repr(list(map(key_of, alike)))) not in recordings:
                    recordings[key] = recorded(alike, model, artifact, layers)
                prefilled = prefill(model, prompts, batch, tokenizer, question, recordings[key])
                done()
                for setting in alike:
                    world.check()
                    report.begin(key_of(setting))
                    results.add(setting, batch.key, prefilled.measure(artifact, decoding(setting), report.step))
                    report.finish()
                    if world.size == 1:
                        _finish(results, setting, prompts, everything, layers)
                    results.write()
                del prefilled  # before the next one takes its memory
    for measured in world.exchange(results.unfinished):
        results.take(measured)
    for setting in missing:  # some may have been measured on every batch, but have no row yet
        _finish(results, setting, prompts, everything, layers)
    if world.first:
        results.write()
        results.remove_shares()
    return Rows(row for row in map(results.row, grid) if row is not None)


def _share(work: Sequence[tuple[Batch, Setting]], world: World) -> list[tuple[Batch, list[Setting]]]:
    """This rank's part of the work, by batch: consecutive, so that few batches are prefilled by two ranks."""
    bounds = [len(work) * rank // world.size for rank in (world.rank, world.rank + 1)]
    found: dict[Batch, list[Setting]] = {}
    for batch, setting in work[slice(*bounds)]:
        found.setdefault(batch, []).append(setting)
    return list(found.items())


def _part(prompts: Prompts, batch: Batch, settings: Sequence[Setting], decoded: bool) -> Part:
    found = samples_of(prompts, batch)
    if found is None:
        assert prompts.windows is not None
        length = prompts.windows.prefix
    else:
        length = max(len(sample.context) + (0 if decoded else len(sample.question)) for sample in found[1].values())
    steps = most_steps(prompts, batch, decoded)
    return Part(length, batch.rows, len(by_sharing(settings)), steps, tuple(map(key_of, settings)))


def check_lengths(prompts: Prompts, model: Any) -> None:
    """Raise KvcalError when a context and what is decoded after it exceed the model's context, or their rotary
    embedding changes between them."""
    context = max_context(model.config)
    parts: list[tuple[str, int, int]] = []
    if prompts.windows:
        parts.append(("perplexity", prompts.windows.prefix, prompts.windows.continuations.shape[1]))
    for task in prompts.tasks:
        longest = max(task.samples, key=lambda sample: len(sample.context) + len(sample.question))
        shortest = min(len(sample.context) for sample in task.samples)
        parts.append((task.key, len(longest.context), len(longest.question) + task.new_tokens))
        rotation.check_lengths(model, shortest, sum(parts[-1][1:]) - 1)
    for name, prefix, continuation in parts:
        if context is not None and prefix + continuation > context:
            raise KvcalError(
                f"{name}: {prefix} + {continuation} tokens exceed this model's context of {context}: "
                "give a smaller --prefix, --continuation or --lengths, or shorter prompts"
            )
        rotation.check_lengths(model, prefix, prefix + continuation - 1)


def _finish(results: Results, setting: Setting, prompts: Prompts, work: Sequence[Batch], layers: int) -> None:
    """Turn a setting's batches into its row once they are all there."""
    measured = {key: Measured(**found) for key, found in results.partial(setting).items()}
    if results.row(setting) is None and all(batch.key in measured for batch in work):
        full = None if setting == FULL else results.row(FULL)
        results.finish(setting, result_row(setting, measured, prompts, work, layers, full))


def _has_windows(model: Any) -> bool:
    """Whether some layers keep the model's own cache, where padding within a row takes a token's place."""
    full, total = full_attention_layers(model)
    return len(full) < total


def _text_config(model: Any) -> Any:
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config
