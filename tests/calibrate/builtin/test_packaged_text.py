"""Books that Debian packages install: found, split by chapter, and said how to get. The packages here are made up."""

import gzip
import json
from itertools import chain
from pathlib import Path

import pytest
from cli_runs import run

from kvcal.artifacts import KvcalError
from kvcal.calibrate.data import open_data
from kvcal.calibrate.recipe_of import recipe_of

CHAPTERS = ["preface", "history", "pumps", "valves", "seals", "tools", "repairs", "index-of-terms"]


def package(root: Path, name: str, pages: dict[str, str], version: str = "1.2-3") -> None:
    folder = root / "usr/share/doc" / name
    for page, text in pages.items():
        (folder / page).parent.mkdir(parents=True, exist_ok=True)
        (folder / page).write_text(f"<html><nav>menu</nav><p>{text}</p>")
    with gzip.open(folder / "changelog.Debian.gz", "wt") as file:
        file.write(f"{name} ({version}) unstable; urgency=low\n\n  * pages\n")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVCAL_TEXT_ROOT", str(tmp_path))
    links = chain.from_iterable((f"{name}.html", f"sect.{name}.html", f"{name}.html#a") for name in CHAPTERS)
    handbook = {f"html/en-US/{name}.html": f"About {name}." for name in CHAPTERS}
    handbook |= {f"html/en-US/sect.{name}.html": f"More about {name}." for name in CHAPTERS}
    handbook["html/en-US/index.html"] = "".join(f'<a href="{link}">x</a>' for link in ("index.html", *links, "no.html"))
    handbook["html/en-US/stray.html"] = "Not in the table of contents."
    package(tmp_path, "debian-handbook", handbook, "11.2")
    faq = {
        f"html/sec{letter}{part}.html": f"{letter}.{part}" for letter in "ABCDEFGH" for part in ("con", 10, 2, "int")
    }
    package(tmp_path, "anarchism", {**faq, "html/links.html": "elsewhere", "html/section.html": "all of it"})
    return tmp_path


def test_a_document_is_a_chapter_and_every_fifth_is_held_out(root):
    held_out, train = set(open_data("debian-handbook:heldout")), set(open_data("debian-handbook"))
    assert held_out == {f"About {name}.\n\nMore about {name}." for name in ("pumps", "index-of-terms")}
    assert train == {f"About {name}.\n\nMore about {name}." for name in CHAPTERS} - held_out
    held_out, train = set(open_data("anarchism", "heldout")), set(open_data("anarchism"))
    sections = {"\n\n".join(f"{letter}.{part}" for part in ("int", 2, 10, "con")): letter for letter in "ABCDEFGH"}
    assert [sections[text] for text in sorted(held_out)] == ["C", "H"] and held_out | train == {*sections}


def test_the_source_states_the_version(root):
    expected = {"kind": "builtin", "id": "debian-handbook", "split": "train", "version": "11.2"}
    assert open_data("debian-handbook").source == expected
    (root / "usr/share/doc/debian-handbook/changelog.Debian.gz").write_bytes(b"damaged")
    assert open_data("debian-handbook").source["version"] is None
    mixed = open_data(["debian-handbook", "anarchism:heldout"]).source
    assert mixed["id"] == "debian-handbook + anarchism" and mixed["sources"][1]["version"] == "1.2-3"


def test_a_recipe_names_them(root):
    from dataclasses import replace

    from samples import artifact

    made = artifact()
    text = {**made.data, "source": open_data("anarchism", "heldout").source}
    assert "anarchism:heldout" in recipe_of(replace(made, data=text), ())


@pytest.mark.parametrize("empty", [False, True])
def test_what_is_not_here_says_how_to_get_it(root, tmp_path_factory, monkeypatch, empty):
    other = tmp_path_factory.mktemp("other")
    if empty:  # as a container without documentation leaves it, or an unpacked package of another layout
        (other / "usr/share/doc/debian-handbook/html/en-US").mkdir(parents=True)
    monkeypatch.setenv("KVCAL_TEXT_ROOT", str(other))
    with pytest.raises(KvcalError) as caught:
        open_data("debian-handbook")
    said = str(caught.value)
    for part in (str(other), "apt install debian-handbook", "dpkg-deb -x debian-handbook_*.deb", "KVCAL_TEXT_ROOT="):
        assert part in said
    assert "\n" not in said


def test_splits_that_there_are_not(root):
    for alias in ("debian-handbook", "anarchism:test"):
        with pytest.raises(KvcalError, match="no split 'test': choose one of train, heldout"):
            open_data(alias, "test" if alias == "debian-handbook" else None)


def test_the_listing_says_what_is_here(root, monkeypatch, tmp_path_factory):
    hub_cache = tmp_path_factory.mktemp("hub")
    (hub_cache / "datasets--allenai--c4" / "snapshots" / "a").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub_cache))
    (root / "usr/share/doc/anarchism").rename(root / "usr/share/doc/gone")
    listed = json.loads(run("datasets", "--json").stdout)
    assert {alias: each["here"] for alias, each in listed.items()} == {
        "debian-handbook": "the package debian-handbook 11.2",
        "anarchism": None,
        "stdlib": "built in",
        "c4": "the Hub's cache",
        "wikitext": None,
        "wikitext-103": None,
    }
    assert [alias for alias, each in listed.items() if each["install"]] == ["anarchism"]
    assert listed["wikitext"]["id"] == "Salesforce/wikitext:wikitext-2-raw-v1:train"
    shown = run("datasets").stdout
    assert "apt install anarchism" in shown and "apt install debian-handbook" not in shown
    assert "not installed" in shown and "needs the Hub" in shown
