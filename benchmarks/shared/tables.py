"""Tables and numbers of a page, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])


def number(value: float | None, form: str = ".3f") -> str:
    """Never "-0.00"."""
    if value is None:
        return "–"
    shown = f"{value:{form}}"
    return shown.removeprefix("-") if float(shown) == 0 else shown


def named(setting: Mapping[str, Any]) -> str:
    """ "`loki` rank 8, keep 0.0625, basis score": what tells settings of one table apart."""
    shown = {
        name: value for name, value in setting.items() if name != "method" and (name, value) != ("select", "group")
    }
    return f"`{setting['method']}` " + ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()
    )


def scores_of(row: Mapping[str, Any]) -> list[str]:
    """By task."""
    return [with_error(score, row["scores_se"][task], ".2f") for task, score in row["scores"].items()]


def with_error(value: float | None, error: float | None, form: str = ".3f") -> str:
    """ "1.017 ± .006"; the error alone is left out where there is none."""
    if value is None:
        return "–"
    if error is None:
        return number(value, form)
    shown = f"{error:{form}}"
    return f"{number(value, form)} ± {shown[1:] if shown.startswith('0.') else shown}"


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error, as a page prints them."""

    value: float
    error: float | None = None
    form: str = ".3f"

    def __str__(self) -> str:
        return with_error(self.value, self.error, self.form)

    @property
    def alone(self) -> str:
        """Without the error."""
        return number(self.value, self.form)

    def to(self, form: str) -> Estimate:
        """Rounded otherwise: ".2f"."""
        return replace(self, form=form)
