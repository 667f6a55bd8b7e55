"""The colours of layers, and the bar that tells which is which."""

import pytest

from kvcal.calibrate.palette import LAYER_COLORS
from kvcal.calibrate.plots import layer_bar, layer_shades, two_panels


def test_layers_go_from_the_first_colour_to_the_last():
    shades = [[255 * channel for channel in shade[:3]] for shade in layer_shades([3, 5, 6, 9, 10])]
    wanted = [[int(color[at : at + 2], 16) for at in (1, 3, 5)] for color in LAYER_COLORS]
    for shade, color in zip(shades, wanted, strict=True):
        assert shade == pytest.approx(color, abs=2)  # a map has 256 steps
    assert len(set(layer_shades(range(30)))) == 30 and len(layer_shades([4])) == 1


@pytest.mark.parametrize("layers", [[0, 1], [1, 4, 7, 9], list(range(30)), list(range(0, 160, 2))])
def test_a_bar_names_layers_at_their_colours(layers):
    figure, axes = two_panels()
    layer_bar(figure, axes, layers)
    (bar,) = set(figure.axes) - set(axes)
    ticks = bar.get_yticks()
    assert [text.get_text() for text in bar.get_yticklabels()] == [str(layers[int(tick)]) for tick in ticks]
    assert ticks[0] == 0 and ticks[-1] == len(layers) - 1 and len(ticks) <= 10


def test_one_layer_needs_no_bar():
    figure, axes = two_panels()
    layer_bar(figure, axes, [3])
    assert set(figure.axes) == set(axes)
