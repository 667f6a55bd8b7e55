"""What does not exist is said not to exist, with the nearest name that does."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcal.artifacts import ArtifactError, KvcalError, load
from kvcal.artifacts.missing import check_exists, does_not_exist, nearest


def test_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "mistral-wikitext" / "inner").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("")
    assert nearest(tmp_path / "mistral-wikitxt") == tmp_path / "mistral-wikitext"
    assert nearest(tmp_path / "mistral-wikitxt" / "inner") == tmp_path / "mistral-wikitext"
    assert nearest(tmp_path / "note.txt") == tmp_path / "notes.txt"
    for none in (tmp_path / "zzz", tmp_path / "notes.txt" / "x", tmp_path, "x" * 300, "a\0b", "~nobody-here/x"):
        assert nearest(none) is None


def test_a_relative_path_is_answered_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("artifact").mkdir()
    assert does_not_exist("artefact") == "artefact: does not exist: did you mean artifact?"
    assert does_not_exist("./zzz", "make it") == "./zzz: does not exist: make it"


def test_check_exists(tmp_path: Path) -> None:
    check_exists(tmp_path)
    (tmp_path / "link").symlink_to("nowhere")
    for path in (tmp_path / "zzz", tmp_path / "link", Path("x" * 300), Path("a\0b")):
        with pytest.raises(KvcalError, match="does not exist"):
            check_exists(path)


def test_an_artifact_and_what_is_none(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArtifactError, match=r"foldr: does not exist: did you mean .*folder\?"):
        load(tmp_path / "foldr")
    with pytest.raises(ArtifactError, match="folder: not an artifact"):
        load(tmp_path / "folder")
