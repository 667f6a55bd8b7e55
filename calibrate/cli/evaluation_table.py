"""An evaluation as tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...artifacts.errors import one_line
from .evaluation_lines import low_score_lines
from .numbers import UNKNOWN, fixed, plain
from .output import print_lines, print_table

Row = Mapping[str, Any]
Columns = dict[str, list[str]]
FEW = 2
"""Tasks that stand among the other columns (one less where they are stated relative to full's, too); more have tables
of their own."""
WIDE = 5
"""Tasks in one such table, at most."""


def print_results(settings: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """One line per setting; the first row is our `full`. Many tasks stand in tables of their own, one for a length."""
    from ..evaluation.figure import name_of
    from ..evaluation.results_file import parameters

    alike = _alike([parameters(row) for row in rows if not row.get("source")])
    names = {
        "method": [name_of(row) for row in rows],
        "settings": [_parameters(parameters(row), alike) for row in rows],
    }
    perplexity: Columns = {}
    if any(row.get("perplexity") is not None for row in rows):
        perplexity["ppl"] = [fixed(row.get("perplexity"), 2) for row in rows]
        ratios = [(row.get("perplexity_ratio"), row.get("perplexity_ratio_se")) for row in rows]
        perplexity["ratio"] = [
            _with_error(value, None if row is rows[0] else error, 3)
            for row, (value, error) in zip(rows, ratios, strict=True)
        ]
    tasks = list(rows[0].get("scores") or {})
    costs = _costs(rows)
    title = "; ".join(
        [_title(settings, bool(perplexity), bool(tasks)), *(f"{name} {value}" for name, value in alike.items())]
    )
    if len(tasks) <= FEW - any(_shows_relative(rows, task) for task in tasks):
        tables = [names | perplexity | _scores(rows, tasks) | costs]
    else:
        tables = [names | _scores(rows, part) for part in by_length(tasks)]
        tables.append(names | perplexity | _means(rows, tasks) | costs)
    for columns in tables:
        print_table(title, list(columns), list(zip(*columns.values(), strict=True)))
    print_lines(*_legend(settings, rows, "hits" in costs, bool(perplexity), tasks), *low_score_lines(rows[0]))


def by_length(tasks: Sequence[str]) -> list[list[str]]:
    """Tasks of one length together, in parts that a table holds."""
    groups: dict[str, list[str]] = {}
    for task in tasks:
        groups.setdefault(task.rpartition("@")[2] if "@" in task else "", []).append(task)
    parts = []
    for group in groups.values():
        count = -(-len(group) // WIDE)
        size = -(-len(group) // count)
        parts += [group[at : at + size] for at in range(0, len(group), size)]
    return parts


def _scores(rows: Sequence[Row], tasks: Sequence[str]) -> Columns:
    """The score of each task; under methods other than `full`, after a slash, what part of full's that is, where full
    has not answered all."""
    found = {}
    for task in tasks:
        column = []
        for number, row in enumerate(rows):
            value = (row.get("scores") or {}).get(task)
            text = _with_error(value, (row.get("scores_se") or {}).get(task), 2)
            relative = (row.get("relative") or {}).get(task)
            if number and value is not None and relative is not None and _shows_relative(rows, task):
                text += _part(relative)
            column.append(text)
        found[one_line(task).replace("@", "\n@")] = column
    return found


def _shows_relative(rows: Sequence[Row], task: str) -> bool:
    """Whether full leaves a task partly unanswered: otherwise a score is its own ratio to full's."""
    return bool(rows[0]["scores"][task] != 1)


def _means(rows: Sequence[Row], tasks: Sequence[str]) -> Columns:
    """Mean scores of RULER's tasks, by length: those named NAME@LENGTH, except passkey and multikey."""
    from ..evaluation.prompts import FACTS
    from ..evaluation.rows import mean_score

    found = {}
    groups: dict[str, list[str]] = {}
    for task in tasks:
        name, _, length = task.rpartition("@")
        if name and length.isdigit() and name not in FACTS:
            groups.setdefault(length, []).append(task)
    for length, group in groups.items():
        if len(group) > 1:
            means = [mean_score(row, "scores", group) for row in rows]
            of_full = means[0][0] or 1.0
            found[f"mean of {len(group)}\n@{length}"] = [
                _with_error(value, error, 2)
                + ("" if value is None or not number or of_full == 1 else _part(value / of_full))
                for number, (value, error) in enumerate(means)
            ]
    return found


def _costs(rows: Sequence[Row]) -> Columns:
    full = rows[0]["bytes_per_step"]
    costs: Columns = {}
    if any(row.get("attention_error") for row in rows):
        costs["error"] = [fixed(_attention(row, "attention_error"), 3) for row in rows]
        costs["mass"] = [fixed(_attention(row, "attention_mass"), 3) for row in rows]
    costs["MB"] = [fixed(_millions(row.get("resident_bytes")), 2) for row in rows]
    costs["read/step"] = [_read(row.get("bytes_per_step"), full) for row in rows]
    costs["ms"] = [plain(row.get("ms_per_step")) for row in rows]
    if any("hit_rate" in row for row in rows):
        costs["hits"] = [fixed(row.get("hit_rate"), 3) for row in rows]
    return costs


def _attention(row: Row, name: str) -> float | None:
    """A mean over layers; None for `cla`, which reads all that the shared model has: there is nothing to measure."""
    return None if row["method"] == "cla" else _mean(row.get(name))


def _title(settings: Mapping[str, Any], perplexity: bool, tasks: bool) -> str:
    parts = [f"prefix {settings['prefix']}, {settings['continuation']} decoded"] if perplexity or not tasks else []
    parts += [f"questions {settings['question']}"] if tasks and settings.get("question") else []
    return f"{settings['model']}: {', '.join(parts)}"


def _legend(
    settings: Mapping[str, Any], rows: Sequence[Row], hits: bool, perplexity: bool, tasks: Sequence[str]
) -> list[str]:
    parts = []
    if perplexity:
        parts += ["ppl: perplexity of the continuation", "ratio: over full's on the same text"]
    if any(_shows_relative(rows, task) for task in tasks):
        parts += ["of tasks: the score, and after / its part of full's"]
    if perplexity or tasks:
        parts += ["±: standard error of what stands before it"]
    if any(row.get("attention_error") for row in rows):
        parts += ["error: ‖o - o_dense‖ / ‖o_dense‖ of the attention output"]
        parts += ["mass: of the dense attention that was read, both means of layers"]
    parts += ["MB: resident, and read per step, of one row", f"ms: per step of up to {settings['batch_size']} rows"]
    if any(str(row["method"]).startswith("cla") for row in rows):
        parts += ["of cla+METHOD, dense is the shared model's own"]
        parts += ["cla alone reads all of that, so that what it loses is in ratio and scores only"]
    if hits:
        parts += ["hits: of what an offloaded cache read, the share on the device"]
    lines, width = [""], 118
    for number, part in enumerate(parts):
        text = part + (";" if number < len(parts) - 1 else "")
        if len(lines[-1]) + len(text) + 1 > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {text}".strip()
    return lines


def _alike(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Parameters other than rank and keep that have one value wherever they are: the title states them."""
    values: dict[str, list[Any]] = {}
    for setting in settings:
        for name, value in setting.items():
            if name not in ("method", "rank", "keep") and value not in values.setdefault(name, []):
                values[name].append(value)
    return {name: found[0] for name, found in values.items() if len(found) == 1}


def _parameters(setting: Mapping[str, Any], alike: Mapping[str, Any]) -> str:
    """ "rank .25 keep .125 score": numbers with their names, words without."""
    shown = {name: value for name, value in setting.items() if name != "method" and name not in alike}
    words = ("basis", "stage", "select")
    return " ".join(str(value) if name in words else f"{name} {value}" for name, value in shown.items()).replace(
        " 0.", " ."
    )


def _mean(by_layer: Sequence[float | None] | None) -> float | None:
    known = [value for value in by_layer or [] if value is not None]
    return sum(known) / len(known) if known else None


def _read(count: float | None, full: float) -> str:
    return UNKNOWN if count is None else f"{fixed(count / 1e6, 2)} ({100 * count / full:.0f} %)"


def _millions(count: float | None) -> float | None:
    return None if count is None else count / 1e6


def _part(relative: float) -> str:
    """ " /.75", " /1.02"."""
    return " /" + f"{relative:.2f}".removeprefix("0")


def _with_error(value: float | None, error: float | None, digits: int) -> str:
    """ "0.85±.08": an error has as many digits as its value."""
    if value is None:
        return UNKNOWN
    return fixed(value, digits) + ("" if error is None else "±" + fixed(error, digits).removeprefix("0"))
