"""One colour and one marker per method, seen on white and on black; contrast by WCAG's formula."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from kvcal.calibrate import palette
from kvcal.calibrate.palette import FALLBACK, METHOD_STYLES, style_of
from kvcal.runtime import METHODS

ROOT = Path(__file__).parents[2] / "src" / "kvcal"
DARK = "#14171c"
"""The ground of the report in dark mode, as calibrate/reports/page.css has it."""
# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
PROTAN = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
DEUTAN = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]


def linear(color):
    channels = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    bright = sorted(float(linear(color) @ [0.2126, 0.7152, 0.0722]) for color in (one, other))
    return (bright[1] + 0.05) / (bright[0] + 0.05)


def oklab(rgb):
    cones = np.cbrt(
        np.clip(rgb, 0, None)
        @ np.array(
            [
                [0.41222147, 0.53633254, 0.05144599],
                [0.21190350, 0.68069955, 0.10739696],
                [0.08830246, 0.28171884, 0.6299787],
            ]
        ).T
    )
    return (
        cones
        @ np.array(
            [
                [0.21045426, 0.79361779, -0.00407205],
                [1.97799850, -2.42859221, 0.45059371],
                [0.02590404, 0.78277177, -0.80867577],
            ]
        ).T
    )


def test_the_dark_ground_is_the_reports():
    assert f"--ground: {DARK};" in (ROOT / "calibrate" / "reports" / "page.css").read_text()


def test_every_method_has_a_colour_and_a_marker_of_its_own():
    assert set(METHODS) | {"cla", "plan"} == set(METHOD_STYLES)
    styles = [*METHOD_STYLES.values(), FALLBACK]
    assert len({style.color for style in styles}) == len({style.marker for style in styles}) == len(styles)


@pytest.mark.parametrize("ground", ["#ffffff", DARK])
def test_every_colour_is_seen_on_both_grounds(ground):
    colors = [style.color for style in (*METHOD_STYLES.values(), FALLBACK)]
    colors += [*palette.QUANTITY_COLORS.values(), *palette.COMPARED_COLORS, *palette.LAYER_COLORS]
    assert min(contrast(color, ground) for color in colors) >= 3


@pytest.mark.parametrize(("sight", "least"), [(np.eye(3), 0.1), (PROTAN, 0.05), (DEUTAN, 0.05)])
def test_colours_of_methods_are_far_apart(sight, least):
    """In Oklab, where a difference of 0.02 is just seen."""
    seen = [oklab(linear(style.color) @ np.array(sight).T) for style in METHOD_STYLES.values()]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) >= least


def test_the_map_of_layers_gets_lighter_all_the_way():
    bright = [float(linear(color) @ [0.2126, 0.7152, 0.0722]) for color in palette.LAYER_COLORS]
    assert bright == sorted(bright) and len(set(bright)) == len(bright)


def test_a_line_has_the_style_of_its_method():
    for name in ("loki", "loki score", "loki tail True", "Loki (kvpress 0.5.5)", "loki, as published"):
        assert style_of(name) == METHOD_STYLES["loki"]
    assert style_of("cla+loki") == style_of("cla, trained") == METHOD_STYLES["cla"]
    assert style_of("fewer bits (simulated)") == style_of("") == style_of("\n") == FALLBACK


def test_figures_take_their_colours_from_the_palette():
    """No other file names one: greys (fractions) and black and white are no colours."""
    own = re.compile(r"""["']C\d|f"C\{|["']#[0-9a-fA-F]{3,8}["']|["'](tab10|Set\d)["']""")
    for path in (ROOT / "calibrate").rglob("*.py"):
        if path.name != "palette.py":
            assert not own.search(path.read_text()), path
