"""Objects in one short line, and as a table in which nothing of a stranger's runs."""

import dataclasses
from html.parser import HTMLParser

import pytest
from samples import artifact

from kvcal.artifacts.shown import html_table, short

HOSTILE = "<script>alert(1)</script>\x1b[31m\n\u202e"


class Cells(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        assert not attributes

    def handle_data(self, data):
        self.texts.append(data)


def test_an_artifact_is_a_line_and_a_table():
    made = artifact()
    line = repr(made)
    assert line.startswith("Artifact(of ") and "\n" not in line and len(line) < 400
    cells = Cells(made._repr_html_())
    assert cells.tags <= {"table", "thead", "tbody", "tr", "td", "th"}
    assert made.model.id in cells.texts and str(len(made.layers)) in cells.texts


@pytest.mark.parametrize("part", ["model", "stage"])
def test_parts_of_an_artifact_are_a_line(part):
    made = artifact()
    shown = made.model if part == "model" else next(iter(made.stages.values()))
    assert "\n" not in repr(shown) and len(repr(shown)) < 250


def test_names_of_strangers_stand_as_text():
    made = artifact()
    hostile = dataclasses.replace(made, model=dataclasses.replace(made.model, id=HOSTILE))
    line = repr(hostile)
    assert not set("\x1b\n\u202e") & set(line)
    cells = Cells(hostile._repr_html_())
    assert "script" not in cells.tags and any("<script>alert(1)</script>" in text for text in cells.texts)


def test_tables_and_lines():
    assert html_table(["a", "b"], [["<", 1]]) == (
        "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>&lt;</td><td>1</td></tr></tbody></table>"
    )
    assert short("x" * 100, 10) == "x" * 9 + "…" and short("a\nb", 10) == "a b"
