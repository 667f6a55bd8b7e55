"""What a method costs in quality and saves in bytes: teacher-forced decoding through the real path.

A prefix is prefilled densely, once for all settings; each setting's cache takes those tokens over, and the
continuation is fed to the model token by token. `full` goes the same way and is what the others are compared with.

Settings of `cla` change the model, so each sharing prefills for itself. Their perplexity and recall are compared with
those of `full` in the model as it is; the error of their attention is against dense attention of the shared model, so
it is that of the method after the "+", and not what sharing costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...artifacts import Artifact, KvcalError
from ...runtime import CompressedCache, sharing_of
from ...runtime.integration import rotation
from ...runtime.wrapped import unwrapped
from ..distributed import SINGLE, World
from ..models import max_context
from .attention_error import AttentionProbe, History, now
from .grid import FULL, Setting, by_sharing, check_grid, decoding, sharing
from .measurements import Batch, Measured, batches, result_row
from .prompts import Prompts
from .results import Results

Progress = Callable[[int, int], None]


def evaluate(
    model: Any,
    artifact: Artifact | None,
    prompts: Prompts,
    grid: Sequence[Setting],
    *,
    batch_size: int = 8,
    results: Results | None = None,
    progress: Progress | None = None,
    world: World = SINGLE,
) -> list[dict[str, Any]]:
    """Measure every setting on every prompt.

    Args:
        model: a transformers causal language model in eval mode.
        grid: from `make_grid`; `full` is run first whether it is there or not.
        batch_size: rows that are decoded together; of them `ms_per_step` is the time.
        results: what earlier runs found, which is not measured again; kept up to date, and on the disk
            when it has a path.
        progress: called with (decode steps done, all), of this rank's share.
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
    check_lengths(prompts, model)
    check_grid(grid, model, artifact)
    missing = [setting for setting in grid if results.row(setting) is None]
    work = _share(
        [
            (batch, setting)
            for batch in batches(prompts, batch_size)
            for setting in missing
            if batch.key not in results.partial(setting)
        ],
        world,
    )
    total = sum(len(settings) * _steps(prompts, batch) for batch, settings in work)
    done = 0
    layers = int(_text_config(model).num_hidden_layers)

    def step() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    results.write()  # a disk that cannot be written to is found now
    if progress:
        progress(0, total)
    for batch, settings in work:
        for alike in by_sharing(settings):
            with sharing(model, artifact, alike[0]):
                prefilled = _Prefilled.run(model, prompts, batch)
                for setting in alike:
                    world.check()
                    results.add(setting, batch.key, prefilled.measure(artifact, decoding(setting), step))
                    if world.size == 1:
                        _finish(results, grid, setting, prompts, batch_size, layers)
                    results.write()
                del prefilled  # before the next one takes its memory
    for measured in world.exchange(results.unfinished):
        results.take(measured)
    for setting in missing:  # those that only their row was missing of
        _finish(results, grid, setting, prompts, batch_size, layers)
    if world.first:
        results.write()
        results.remove_shares()
    return [row for row in map(results.row, grid) if row is not None]


def _share(work: Sequence[tuple[Batch, Setting]], world: World) -> list[tuple[Batch, list[Setting]]]:
    """This rank's part of the work, by batch: consecutive, so that few batches are prefilled by two ranks."""
    bounds = [len(work) * rank // world.size for rank in (world.rank, world.rank + 1)]
    found: dict[Batch, list[Setting]] = {}
    for batch, setting in work[slice(*bounds)]:
        found.setdefault(batch, []).append(setting)
    return list(found.items())


def check_lengths(prompts: Prompts, model: Any) -> None:
    """Raise KvcalError when a prefix and its continuation exceed the model's context, or their rotary embedding
    changes between them."""
    context = max_context(model.config)
    parts = ([("perplexity", prompts.windows)] if prompts.windows else []) + [(t.key, t) for t in prompts.recall]
    for name, part in parts:
        prefix, continuation = part.prefixes.shape[1], part.continuations.shape[1]
        if context is not None and prefix + continuation > context:
            raise KvcalError(
                f"{name}: {prefix} + {continuation} tokens exceed this model's context of {context}: "
                "give a smaller --prefix, --continuation or --lengths"
            )
        rotation.check_lengths(model, prefix, prefix + continuation - 1)


def _finish(
    results: Results, grid: Sequence[Setting], setting: Setting, prompts: Prompts, batch_size: int, layers: int
) -> None:
    """Turn a setting's batches into its row once they are all there."""
    measured = {key: Measured(**found) for key, found in results.partial(setting).items()}
    if results.row(setting) is None and all(batch.key in measured for batch in batches(prompts, batch_size)):
        full = None if setting == FULL else results.row(FULL)
        results.finish(setting, result_row(setting, measured, prompts, batch_size, layers, full))


@dataclass(frozen=True)
class _Prefilled:
    """A batch after its dense prefill."""

    model: Any
    batch: Batch
    cache: Any
    """A `full` cache of the prefixes; only ever copied from."""
    logits: Tensor
    """[B, vocabulary] at the last prefix position."""
    continuations: Tensor
    """[B, C] int64."""
    answers: Tensor | None
    """[B, C] bool, which tokens of the continuation are an answer; None: nothing was asked."""
    histories: Mapping[int, History]
    """For the probe, by layer; {} where nothing is probed."""

    @classmethod
    @torch.no_grad()
    def run(cls, model: Any, prompts: Prompts, batch: Batch) -> _Prefilled:
        rows = slice(batch.first, batch.first + batch.rows)
        task = next((task for task in prompts.recall if task.key == batch.task), None)
        part = task or prompts.windows
        assert part is not None
        found = sharing_of(model)
        recorded = found is None or not found.map.shared  # for h2o, which layers that share do not allow
        cache = CompressedCache(model, None, "full", record_mass=recorded)
        out = model(part.prefixes[rows].to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        continuations = part.continuations[rows].to(model.device)
        answers, histories = None, {}
        if task:
            answers = torch.zeros_like(continuations, dtype=torch.bool)
            for row, answer in enumerate(task.answers[rows]):
                answers[row, answer.start : answer.stop] = True
        else:
            histories = {
                layer: History(store.rows["key"].view, store.rows["value"].view, continuations.shape[1])
                for layer, store in cache.stores.items()
            }
        return cls(model, batch, cache, out.logits[:, -1], continuations, answers, histories)

    @torch.no_grad()
    def measure(self, artifact: Artifact | None, setting: Setting, step: Callable[[], None]) -> Measured:
        """Decode the continuation through a cache of its own.

        Args:
            setting: the cache's.
        """
        cache = CompressedCache(self.model, artifact, **setting)
        cache.adopt(self.cache)
        probe = AttentionProbe(self.histories)
        if self.histories:
            cache.observer = probe
        logits, device = self.logits, self.continuations.device
        nll, likeliest, read, ms = [], [], [], []
        for position in range(self.continuations.shape[1]):
            token = self.continuations[:, position : position + 1]
            if position:
                probed, started = probe.seconds, now(device)
                out = self.model(self.continuations[:, position - 1 : position], past_key_values=cache, use_cache=True)
                ms.append(1000 * (now(device) - started - (probe.seconds - probed)))
                read.append(cache.bytes_read())
                logits = out.logits[:, -1]
                step()
            nll.append(-logits.double().log_softmax(-1).gather(1, token))
            likeliest.append(logits.argmax(-1, keepdim=True) == token)
        error, mass = probe.result()
        hits = torch.cat(likeliest, 1)
        return Measured(
            nll=torch.cat(nll, 1).sum(1).tolist(),
            exact=[] if self.answers is None else (hits | ~self.answers).all(1).tolist(),
            resident_bytes=cache.resident_bytes(),
            bytes_read=read,
            ms=ms,
            error={str(layer): value for layer, value in error.items()},
            mass={str(layer): value for layer, value in mass.items()},
            device_hits=list(cache.device_hits()),
        )


def _steps(prompts: Prompts, batch: Batch) -> int:
    parts = {task.key: task.continuations for task in prompts.recall}
    if prompts.windows:
        parts["perplexity"] = prompts.windows.continuations
    return parts[batch.task].shape[1] - 1


def _text_config(model: Any) -> Any:
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config
