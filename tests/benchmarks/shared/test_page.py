"""A page and its figures are older than their data or template, or they are not."""

import io
import json

import jinja2
import pytest

from benchmarks.shared.page import Figure, Page, digest_in, stamped
from benchmarks.shared.tables import Estimate

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def page(tmp_path):
    (tmp_path / "speed.json").write_text(json.dumps({"ms": 2}))
    (tmp_path / "page.md.j2").write_text("It takes {{ ms }} ms.\n")
    drawn = []

    def values(results):
        return json.loads((results / "speed.json").read_text())

    def draw():
        drawn.append(1)
        out = io.BytesIO()
        Image.new("RGB", (3, 2), (len(drawn), 0, 0)).save(out, "PNG")
        return out.getvalue()

    def figures(results):
        return [Figure("speed.png", [results / "speed.json"], draw)]

    return Page("speed.md", tmp_path / "page.md.j2", values, figures)


def test_what_was_written_is_not_older_until_its_data_change(page, tmp_path):
    pages = tmp_path / "docs"
    assert page.older(tmp_path, pages) == ["speed.md", "speed.png"]
    page.write(tmp_path, pages)
    assert (pages / "speed.md").read_text() == "It takes 2 ms.\n" and page.older(tmp_path, pages) == []
    (tmp_path / "speed.json").write_text(json.dumps({"ms": 3}))
    assert page.older(tmp_path, pages) == ["speed.md", "speed.png"]
    page.write(tmp_path, pages)
    assert page.older(tmp_path, pages) == []


def test_words_alone_do_not_draw_the_figure_again(page, tmp_path):
    page.write(tmp_path, tmp_path)
    before = (tmp_path / "speed.png").read_bytes()
    (tmp_path / "page.md.j2").write_text("It takes {{ ms }} milliseconds.\n")
    assert page.older(tmp_path, tmp_path) == ["speed.md"]
    page.write(tmp_path, tmp_path)
    assert (tmp_path / "speed.png").read_bytes() == before


def test_a_name_that_there_is_not_is_an_error(page, tmp_path):
    (tmp_path / "page.md.j2").write_text("{{ seconds }}")
    with pytest.raises(jinja2.UndefinedError, match="seconds"):
        page.text(tmp_path)


def test_a_stamped_png_is_the_same_picture(tmp_path):
    """As Pillow reads it, its text included."""
    out = io.BytesIO()
    Image.new("RGB", (5, 4), (1, 2, 3)).save(out, "PNG")
    path = tmp_path / "a.png"
    assert digest_in(path) is None
    path.write_bytes(out.getvalue())
    assert digest_in(path) is None
    path.write_bytes(stamped(out.getvalue(), "0f" * 32))
    assert digest_in(path) == "0f" * 32
    with Image.open(path) as image:
        assert image.text == {"Data-sha256": "0f" * 32} and image.size == (5, 4) and image.getpixel((4, 3)) == (1, 2, 3)


def test_estimates_are_rounded_where_they_are_shown():
    ratio = Estimate(1.2345, 0.0678)
    assert (str(ratio), ratio.alone, str(ratio.to(".1f"))) == ("1.234 ± .068", "1.234", "1.2 ± .1")
    assert str(Estimate(-0.0001, 0.0002)) == "0.000 ± .000" and str(Estimate(-0.02, 0.01)) == "-0.020 ± .010"
    assert str(Estimate(2413.6, 3664.4, ".0f")) == "2414 ± 3664" and str(Estimate(1.5)) == "1.500"
