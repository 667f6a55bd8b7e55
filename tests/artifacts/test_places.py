"""Places where nothing can be written, or where something would be lost: said by name, and nothing is left there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kvcal.artifacts import KvcalError
from kvcal.artifacts.places import check_can_write_in, check_new_file, check_new_folder


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(b"theirs")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_bytes(b"theirs")
    for name, target in {"dangling": "no/where", "to-file": "file", "to-empty": "empty", "loop": "loop"}.items():
        (tmp_path / name).symlink_to(target)
    return tmp_path


def everything(folder: Path) -> list[tuple[str, bytes | None]]:
    return [(str(path), path.read_bytes() if path.is_file() else None) for path in sorted(folder.rglob("*"))]


NEITHER = {
    "dangling": "is a link",
    "loop": "is a link",
    "file/x": "is not a folder",
    "dangling/x": "is not a folder|is a link",
    "loop/x": "cannot be written|is not a folder",
    "x" * 256: "File name too long",
    "x" * 248: "File name too long",
    "é" * 125: "File name too long",
    "/".join(["x" * 200] * 30): "File name too long",
    "a\0b": "null byte|is not a folder",
    os.fsdecode(b"\xff\xfe"): "not UTF-8",
    "empty/..": "no name of its own",
    "/": "no name of its own|no plain file",
    "/proc/kvcal": "cannot be written",
    "/proc/self/no/where": "cannot be written|not a folder",
}


@pytest.mark.parametrize("name", NEITHER, ids=lambda name: ascii(name[:20]))
def test_places_of_neither_a_file_nor_a_folder(here: Path, name: str) -> None:
    before = everything(here)
    for check in (check_new_folder, check_new_file):
        with pytest.raises(KvcalError, match=NEITHER[name]):
            check(here / name)
    assert everything(here) == before


@pytest.mark.parametrize("name", ["file", "to-file", "to-empty", "no/../x"])
def test_places_of_no_folder(here: Path, name: str) -> None:
    with pytest.raises(KvcalError, match=r"is no folder|is a link|leads through"):
        check_new_folder(here / name)


@pytest.mark.parametrize("name", ["x", "a/b/c", "empty", "full", "empty/../y", "x" * 200, "ü"])
def test_places_of_a_folder(here: Path, name: str) -> None:
    before = everything(here)
    check_new_folder(here / name)
    assert everything(here) == before


def test_the_current_folder_cannot_appear(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here / "empty")
    for name in (Path(), here / "empty"):
        with pytest.raises(KvcalError, match="is in use as a folder"):
            check_new_folder(name)


def test_places_of_a_file(here: Path) -> None:
    before = everything(here)
    check_new_file(here / "x")
    check_new_file(here / "file", lambda path: path.read_bytes() == b"theirs")
    cases: dict[str, tuple[str, Callable[[Path], bool] | None]] = {
        "empty": ("no plain file", None),
        "to-file": ("is a link", lambda path: True),
        "file": ("already exists", None),
        "no/x": ("is not a folder", None),
    }
    for name, (message, replaceable) in cases.items():
        with pytest.raises(KvcalError, match=message):
            check_new_file(here / name, replaceable)
    with pytest.raises(KvcalError, match="file: is there and not a plan, and would be lost"):
        check_new_file(here / "file", lambda path: False, "a plan")
    os.mkfifo(here / "pipe")
    with pytest.raises(KvcalError, match="no plain file"):
        check_new_file(here / "pipe", lambda path: True)
    (here / "pipe").unlink()
    assert everything(here) == before


def test_a_folder_that_takes_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_can_write_in(here, "x")
    with pytest.raises(KvcalError, match="/proc: cannot be written"):
        check_can_write_in(Path("/proc"))

    def read_only(self: Path, *_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    for check in (check_can_write_in, lambda folder: check_new_file(folder / "x"), lambda f: check_new_folder(f / "x")):
        with pytest.raises(KvcalError, match="Read-only file system"):
            check(here)
