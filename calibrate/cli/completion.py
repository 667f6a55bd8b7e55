"""What a shell offers for a half-typed word: aliases and names, or else paths. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterable

import click
from click.shell_completion import CompletionItem

METHODS = (
    *("full", "spectral", "loki", "exact_topk", "clusterkv", "quest", "sparq", "streaming", "h2o", "snapkv", "subgen"),
    *("xcla", "cla", "plan"),
)
"""Those of `kvcal.runtime.METHODS`, which needs torch, and what `--method` of `evaluate` takes besides."""
TASKS = ("perplexity", "passkey", "multikey", "ruler")
PATTERNS = ("uniform", "keep-ends", "dense-front", "dense-back", "auto")


def complete_models(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from ..models.aliases import MODEL_ALIASES

    return _names_or_paths(MODEL_ALIASES, incomplete)


def complete_data(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from ..data_aliases import DATA_ALIASES

    return _names_or_paths(DATA_ALIASES, incomplete)


def complete_method(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in METHODS if name.startswith(incomplete)]


def complete_methods(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _last_of_list(METHODS, incomplete)


def complete_tasks(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _last_of_list(TASKS, incomplete)


def complete_pattern(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in PATTERNS if name.startswith(incomplete)]


def _names_or_paths(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    """The names that begin so; where none does, the shell completes a path."""
    found = [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]
    return found or [CompletionItem(incomplete, type="file")]


def _last_of_list(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    """The last word of a comma list, with those before it."""
    before, comma, last = incomplete.rpartition(",")
    return [CompletionItem(f"{before}{comma}{name}") for name in names if name.startswith(last)]
