"""The page: a Jinja2 template, a style, and one script, which is the plotting library with `page.js`.

Nothing on it is fetched: its Content-Security-Policy forbids all requests, and every script but the one whose hash it
names. What strangers wrote reaches it as text that Jinja2 escapes, and as JSON in a block of data, in which `<`, `>`,
`&` and line separators are escapes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ...artifacts import QUANTITIES
from .figures.curves import covers_figure, spectra_figure
from .figures.plan_figure import plan_figure
from .figures.quality import COSTS, QUALITIES, TITLES, legend, quality_figure
from .figures.rank_map import rank_map
from .fitted import NAMES, Spectrum
from .gathered import Gathered
from .measured import ALLOWANCE, Evaluation

HERE = Path(__file__).parent
GENERATOR = "kvcal report"
"""What a page says of itself, by which the command knows that it may replace it."""


def render(found: Gathered) -> str:
    """HTML of all that was gathered."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"figure": _number}
    style, script = (HERE / "page.css").read_text("utf-8"), _script()
    figures = dict(_figures(found))
    return environment.get_template("page.html.j2").render(
        found=found,
        figures=figures,
        drawn=[_Drawn(number, each, figures) for number, each in enumerate(found.evaluations)],
        names={quantity: NAMES[quantity] for quantity in QUANTITIES},
        rank_rows=_rank_rows(found),
        spectrum_rows=_spectrum_rows(found),
        generator=GENERATOR,
        titles=TITLES,
        allowance=f"{100 * (ALLOWANCE - 1):.0f} %",
        policy=_policy(style, script),
        # Ours and the library's, of fixed text: nothing of a stranger's is in them.
        style=Markup(style),
        script=Markup(script),
    )


def is_report(path: Path) -> bool:
    """Whether a file is a page that `render` made."""
    with path.open("rb") as file:
        return f'<meta name="generator" content="{GENERATOR}">'.encode() in file.read(2000)


@dataclass(frozen=True)
class _Drawn:
    """An evaluation with the figures that there are of it."""

    number: int
    evaluation: Evaluation
    figures: dict[str, Any]

    @property
    def places(self) -> list[str]:
        """Ids of its figures."""
        names = [f"quality-{self.number}-{cost}-{quality}" for quality in QUALITIES for cost in COSTS]
        return [name for name in names if name in self.figures]

    @property
    def legend(self) -> list[Any]:
        return legend(self.evaluation.points)


def _figures(found: Gathered) -> Iterator[tuple[str, dict[str, Any]]]:
    """(id of its place, specification) of every figure for which there is data."""
    yield "rank-map", rank_map(found.ranks)
    yield "spectra", spectra_figure(found.spectra)
    if found.covers:
        yield "covers", covers_figure(found.covers)
    for number, each in enumerate(found.evaluations):
        for cost in COSTS:
            for quality in QUALITIES:
                if (specification := quality_figure(each.points, cost, quality)) is not None:
                    yield f"quality-{number}-{cost}-{quality}", specification
    if found.plan and (bars := plan_figure(found.plan)):
        yield "plan", bars


def _rank_rows(found: Gathered) -> list[tuple[str, list[str]]]:
    """(layer, the ranks of its heads in each quantity)"""
    by_layer: dict[tuple[int, int | None], dict[str, list[str]]] = {}
    for rank in found.ranks:
        by_layer.setdefault((rank.layer, rank.window), {}).setdefault(rank.quantity, []).append(str(rank.rank))
    return [
        (f"{layer}*" if window else str(layer), [" ".join(quantities[name]) for name in QUANTITIES])
        for (layer, window), quantities in by_layer.items()
    ]


def _spectrum_rows(found: Gathered) -> dict[str, tuple[Sequence[int], list[tuple[int, list[str]]]]]:
    """By quantity (dimensions, rows of a layer and the shares in percent), at powers of two and the last."""
    rows: dict[str, tuple[Sequence[int], list[tuple[int, list[str]]]]] = {}
    for quantity in QUANTITIES:
        spectra = [spectrum for spectrum in found.spectra if spectrum.quantity == quantity]
        last = {spectrum.dims[-1] for spectrum in spectra}  # heads of some layers may have more dimensions
        chosen = sorted({dim for each in spectra for dim in each.dims if dim & (dim - 1) == 0} | last)
        rows[quantity] = (chosen, [(each.layer, _shares(each, chosen)) for each in spectra])
    return rows


def _shares(spectrum: Spectrum, dims: Sequence[int]) -> list[str]:
    known = dict(zip(spectrum.dims, spectrum.explained, strict=True))
    return [f"{100 * known[dim]:.1f}" if dim in known else "–" for dim in dims]


def _number(value: float | None, error: float | None = None, digits: int = 3) -> str:
    """ "1.023 ± 0.025"; a dash for what was not measured."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error else "")


@cache
def _script() -> str:
    """Vega, Vega-Lite and vega-embed as vl-convert packs them, with our own lines behind them."""
    import vl_convert

    return str(vl_convert.javascript_bundle((HERE / "page.js").read_text("utf-8")))


def _policy(style: str, script: str) -> str:
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )
