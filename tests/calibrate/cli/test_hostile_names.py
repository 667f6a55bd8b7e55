"""Names that a stranger put into a manifest, a plan or a results file: shown and written, never obeyed."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from markdown_it import MarkdownIt
from samples import artifact as sample

from kvcal.artifacts import Artifact, load, save
from kvcal.artifacts.errors import one_line
from kvcal.calibrate.card import _card
from kvcal.calibrate.cla.export import _card as export_card
from kvcal.calibrate.cli import cli
from kvcal.calibrate.cli.evaluation_table import print_results
from kvcal.calibrate.cli.output import print_table
from kvcal.calibrate.evaluation.figure import evaluation_figure
from kvcal.calibrate.markdown import code, front_matter
from kvcal.calibrate.plots import rank_figure
from kvcal.calibrate.rank import rank_report
from kvcal.calibrate.recipe import read_recipe
from kvcal.calibrate.recipe_of import recipe_of

PIECES = {
    "terminal": "\x1b[2J\x1b]8;;http://evil\x07 \x9b31m \x00 \x7f \b\b\b \r",
    "unseen": "\u202edcba\u202c \u2066x\u2069 \u200b\u200d\ufeff \u00ad \u3164 \ufe0f \u034f \U000e0041",
    "lines": "a\nb\r\n# heading\n\n---\n\nlicense: evil\u2028c\u2029d\x85e\x0bf",
    "markup": "[red]x[/red] [link=http://evil]y[/link] [/] {task.description} %s {0} :bomb:",
    "html": "<img src=http://evil/p.png> <script>x</script> </td></table> <!-- &lt;b&gt; -->",
    "markdown": "![p](http://evil/p.png) [a](http://evil) <http://evil> http://evil.org **b** | x \\| || `c` ``d`` \\`",
    "formula": "$\\frac{ $ $x$ \\$ $$",
}
HOSTILE = " ".join(PIECES.values())


def named(name: str) -> Artifact:
    """An artifact with `name` wherever its manifest takes one."""
    made = sample()
    source = {"id": name, "kind": "hub", "config": name, "split": name, "revision": name, "files": [name]}
    stages = {
        **made.stages,
        "pca": replace(made.stages["pca"], settings={"note": name, "more": {"first_losses": name}, name: 1}),
    }
    return replace(
        made,
        model=replace(made.model, id=name, revision=name, fingerprint={"model_type": name, "id": {"x": name}}),
        data={**made.data, "source": source},
        settings={**made.settings, "note": [name], name: name},
        versions={"kvcal": name, name: name},
        stages=stages,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of artifacts with a hostile and with a harmless name."""
    place = tmp_path_factory.mktemp("named")
    for name, value in (("hostile", HOSTILE), ("harmless", "x y")):
        save(named(value), place / name)
    return place / "hostile", place / "harmless"


def shown(*arguments: object) -> str:
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def check_printable(text: str) -> None:
    for character in text.replace("\n", ""):
        assert unicodedata.category(character) not in ("Cc", "Cf", "Zl", "Zp", "Cs", "Co"), ascii(character)
        assert character not in "\u3164\ufe0f\u034f"


def test_commands_print_names_as_text(folders: tuple[Path, Path]) -> None:
    """As many lines as of a harmless name, and each is of the command."""
    for command in ("inspect", "verify"):
        hostile, harmless = (shown(command, folder) for folder in folders)
        check_printable(hostile)
        assert hostile.count("\n") == harmless.count("\n")
    text = shown("diff", *folders)
    check_printable(text)
    assert all(line.startswith(("data.", "model.", "settings.", "versions.", "the ")) for line in text.splitlines())
    recipe, usual = (shown("recipe", folder) for folder in folders)
    check_printable(recipe)
    assert recipe.count("\n#") == usual.count("\n#") and yaml.safe_load(recipe).keys() == yaml.safe_load(usual).keys()


def test_json_has_names_as_they_are(folders: tuple[Path, Path]) -> None:
    text = shown("inspect", folders[0], "--json")
    check_printable(text)
    found = json.loads(text)
    assert found["model"]["id"] == HOSTILE and found["settings"][HOSTILE] == HOSTILE


@pytest.mark.parametrize("piece", PIECES)
def test_one_line(piece: str) -> None:
    line = one_line(PIECES[piece])
    check_printable(line)
    assert "\n" not in line and one_line(line) == line
    assert one_line("Ünïcode ist 好 – 😀, 1 §") == "Ünïcode ist 好 – 😀, 1 §"


def blocks(text: str) -> list[str]:
    """The structure of a Markdown text: its tokens without their content."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    return [found.type for token in tokens for found in (token, *(token.children or ()))]


@pytest.mark.parametrize("piece", [*PIECES, "all"])
def test_a_card_has_the_structure_of_any_other(piece: str) -> None:
    name = HOSTILE if piece == "all" else PIECES[piece]
    cards = [_card(named(each), rank_report(sample(), 0.9)) for each in (name, "x y")]
    assert blocks(cards[0]) == blocks(cards[1])
    assert blocks(cards[0]).count("image") == 1 and not {"html_inline", "html_block", "link_open"} & {*blocks(cards[0])}
    _, head, rest = cards[0].split("---\n", 2)
    assert yaml.safe_load(head) == {"library_name": "kvcal", "tags": ["kvcal", "kv-cache", "calibration"]}
    assert rest.startswith("\n# kvcal artifact: `")
    check_printable(cards[0])


def test_a_card_names_repositories_of_the_hub() -> None:
    made = named("org/name-1.0")
    assert yaml.safe_load(_card(made, rank_report(made, 0.9)).split("---\n")[1])["base_model"] == "org/name-1.0"


def test_the_card_of_an_exported_model_quotes_too() -> None:
    made = [named(name) for name in (HOSTILE, "x y")]
    cards = []
    for each in made:
        cla = replace(each.stages["pca"], settings={"groups": "0-1"})
        cards.append(export_card(replace(each, stages={**each.stages, "cla": cla}), 1))
    assert blocks(cards[0]) == blocks(cards[1])
    check_printable(cards[0])


def test_yaml_and_code() -> None:
    for name in (*PIECES.values(), HOSTILE, "yes", "- x", "a: b", "'", '"'):
        text = front_matter({"a": name, "b": [name]})
        assert text.startswith("---\n") and text.endswith("\n---") and text.count("\n---") == 1
        assert yaml.safe_load(text.strip("-")) == {"a": name, "b": [name]}
    assert code("org/model") == "`org/model`" and code(" ") == "–" and code("a`b|c") == r"`a\x60b\x7cc`"
    assert len(code("x" * 10_000)) == 302


def test_figures_take_any_name() -> None:
    assert rank_figure(named(PIECES["formula"]), rank_report(sample(), 0.9)).startswith(b"\x89PNG")
    for name in (HOSTILE, "_" + "x" * 5000):
        rows = [{"method": "full", "bytes_per_step": 4, "perplexity_ratio": 1.0, "scores": {name: 1.0}}]
        rows += [{**rows[0], "method": name, "source": name, "basis": name}]
        settings = {"model": name, "prefix": name}
        assert evaluation_figure(settings, rows).startswith(b"\x89PNG")


def test_tables_quote_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("[red]title[/red]\n\x1b[2J", ["[b]head", "b"], [["[link=http://x]c[/link]", "\x1b[31m :bomb:"]])
    found = capsys.readouterr().out
    check_printable(found)
    for text in ("[red]title[/red] ", "[b]head", "[link=http://x]c[/link]", r"\x1b[31m :bomb:"):
        assert text in found


def test_a_results_table_quotes_names(capsys: pytest.CaptureFixture[str]) -> None:
    row: dict[str, Any] = {"method": "full", "bytes_per_step": 4.0, "perplexity": 1.0, "scores": {PIECES["lines"]: 1.0}}
    rows = [row, {**row, "method": HOSTILE, "source": HOSTILE, HOSTILE: HOSTILE}]
    print_results({"model": HOSTILE, "prefix": HOSTILE, "continuation": 8, "batch_size": HOSTILE}, rows)
    check_printable(capsys.readouterr().out)


ODD = [
    *PIECES.values(),
    HOSTILE,
    "it's",
    '"',
    "a\n b",
    " x ",
    "yes",
    "1",
    "~",
    "- a",
    "a: b",
    "# c",
    "x " * 99,
    "é好😀",
    "@",
]


@pytest.mark.parametrize("name", ODD, ids=range(len(ODD)))
def test_a_recipe_is_read_as_it_was_meant(tmp_path: Path, name: str) -> None:
    made = save(named(name), tmp_path / "a")
    text = recipe_of(made, {"seed", "device"})
    check_printable(text)
    (tmp_path / "r.yaml").write_text(text, "utf-8")
    found = read_recipe(tmp_path / "r.yaml", ("cluster",))
    assert found.pca.settings["model"] == f"{name}@{name}"
    assert found.pca.settings["data"] == f"{name}@{name}:{name}:{name}".rstrip(":")
    assert found.expect == {"text_sha256": "1" * 64, "weights_sha256": "0" * 64}
    assert {*found.pca.settings} == {"model", "data", "output", "num_tokens", "seq_len", "seed"}


def test_a_recipe_takes_no_options_that_no_pass_writes_down(tmp_path: Path) -> None:
    made = sample()
    clusters = replace(made.stages["pca"], settings={"clusters": 3, "plot": "/tmp/x.png"})
    added = {**made.settings, "output": "/tmp/x", "device_map": "auto"}
    text = recipe_of(replace(made, settings=added, stages={**made.stages, "clusters": clusters}), {"output", "seed"})
    body = yaml.safe_load(text)
    blocks, length = made.data["blocks"], made.data["seq_len"]
    assert body["pca"] == {"num_tokens": blocks * length, "seq_len": length, "seed": 0}
    assert body["stages"] == [{"cluster": {"clusters": 3}}]


def test_whatever_commands_print_goes_through_one_function() -> None:
    folder = Path(cli.callback.__code__.co_filename).parent
    printing = [path.name for path in folder.glob("*.py") if "click.echo(" in path.read_text("utf-8")]
    assert sorted(printing) == ["output.py", "recipe.py"]
    assert not [path for path in folder.glob("*.py") if "    print(" in path.read_text("utf-8")]


def test_loading_and_saving_keep_names(folders: tuple[Path, Path]) -> None:
    assert load(folders[0]).model.id == HOSTILE
