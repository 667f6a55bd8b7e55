"""Converted once, whole or not at all, by one process, and only what is intact is taken from the cache."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf_files
import pytest
from forked import forked

from kvcal.artifacts import KvcalError
from kvcal.calibrate.models import converted as module
from kvcal.calibrate.models.converted import cache_folder, converted


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_files.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", gguf_files.tiny_llama())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVCAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stand-in for the conversion, which takes a moment; its list grows with every call."""
    calls: list[str] = []

    def convert(folder: Path, file: str, header: Any, name: str, building: Path, progress: Any) -> None:
        calls.append(name)
        time.sleep(0.1)
        (building / "config.json").write_text("{}")
        (building / "model.safetensors").write_bytes(bytes(5000))

    monkeypatch.setattr(module, "convert", convert)
    return calls


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("KVCAL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "kvcal"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, as its specification says
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "kvcal"


def test_once_for_a_content_wherever_it_lies(file: Path, tmp_path: Path, conversions: list[str]) -> None:
    place = converted([file], "a")
    shutil.copy(file, tmp_path / "copy")
    cut = [tmp_path / f"piece{number}" for number in range(3)]
    content = file.read_bytes()
    for number, piece in enumerate(cut):
        piece.write_bytes(content[number * 9000 :][: 9000 if number < 2 else None])
    assert {converted([tmp_path / "copy"], "b"), converted(cut, "c")} == {place} and conversions == ["a"]
    os.utime(file)
    assert converted([file], "d") == place and conversions == ["a"]


def test_another_version_of_what_reads_it_converts_anew(
    file: Path, conversions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = converted([file], "a")
    monkeypatch.setattr(module, "version", lambda package: "9.9")
    assert converted([file], "b") != place and conversions == ["a", "b"]
    monkeypatch.setattr(module, "RULES", module.RULES + 1)
    assert converted([file], "c") != place and len(conversions) == 3


DAMAGE: dict[str, Callable[[Path], object]] = {
    "one-byte": lambda place: (place / "model.safetensors").write_bytes(bytes(4999) + b"x"),
    "cut-off": lambda place: os.truncate(place / "model.safetensors", 4000),
    "file-gone": lambda place: (place / "config.json").unlink(),
    "file-more": lambda place: (place / "adapter_config.json").write_text("{}"),
    "sums-gone": lambda place: (place / "kvcal-gguf.json").unlink(),
    "sums-damaged": lambda place: (place / "kvcal-gguf.json").write_text('{"files": 3}'),
    "a-link": lambda place: [
        (place / "config.json").rename(place.parent / "other"),
        (place / "config.json").symlink_to(place.parent / "other"),
    ],
    "a-file": lambda place: [shutil.rmtree(place), place.write_text("")],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_converted_again(damage: str, file: Path, conversions: list[str]) -> None:
    place = converted([file], "a")
    whole = {path.name: path.read_bytes() for path in place.iterdir()}
    DAMAGE[damage](place)
    assert converted([file], "a") == place and len(conversions) == 2
    assert {path.name: path.read_bytes() for path in place.iterdir()} == whole


def test_one_converts_and_the_others_wait(file: Path, conversions: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    two_wait, found, waiting = threading.Event(), list[Path](), list[str]()
    whole = module.convert

    def convert(*arguments: Any) -> None:
        assert two_wait.wait(60)
        whole(*arguments)

    def tell(done: int, total: int | None, note: str = "") -> None:
        if note == "waiting: another process converts it":
            waiting.append(note)
            if len(waiting) == 2:
                two_wait.set()

    def run() -> None:
        found.append(converted([file], "a", tell))

    monkeypatch.setattr(module, "convert", convert)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 3 and conversions == ["a"]


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")], ids=repr)
def test_an_interrupted_conversion_leaves_nothing(
    fault: Any, file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, conversions: list[str]
) -> None:
    whole = module.convert

    def half(folder: Path, file: str, header: Any, name: str, building: Path, progress: Any) -> None:
        (building / "config.json").write_text("{}")
        raise fault

    monkeypatch.setattr(module, "convert", half)
    with pytest.raises((KvcalError, KeyboardInterrupt)) as caught:
        converted([file], "a")
    if isinstance(fault, OSError):
        assert "cannot be written (No space left on device: free some space and try again)" in str(caught.value)
    assert names(cache) == ["gguf"]
    monkeypatch.setattr(module, "convert", whole)
    assert converted([file], "a").is_dir()


def test_what_a_killed_process_left_is_removed(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, conversions: list[str]
) -> None:
    def convert(folder: Path, file: str, header: Any, name: str, building: Path, progress: Any) -> None:
        (building / "config.json").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as killed:
        killed.setattr(module, "convert", convert)
        assert forked(lambda: converted([file], "a")) == -signal.SIGKILL
    assert "config.json" in names(cache)
    place = converted([file], "a")
    assert [path.name for path in place.parent.iterdir()] == ["checkpoint"]
    assert (place / "config.json").read_text() == "{}"


def test_a_cache_that_cannot_be_written(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text("a file in its place")
    with pytest.raises(KvcalError, match=r"a: its converted copy cannot be kept in .*cache/gguf \(.*set KVCAL_CACHE"):
        converted([file], "a")


def test_a_cache_that_is_whole_needs_not_be_written(
    file: Path, conversions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = converted([file], "a")

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(module, "make_folder", refuse)
    monkeypatch.setattr(module, "locked", refuse)
    assert converted([file], "a") == place


def test_too_little_room_is_said_before_the_work(
    file: Path, cache: Path, conversions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(KvcalError, match=r"has 0.0 GB of room, .*free some, or set KVCAL_CACHE"):
        converted([file], "a")
    assert not conversions and names(cache) == ["gguf"]


def test_a_file_that_changes_meanwhile(
    file: Path, tmp_path: Path, cache: Path, conversions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.gguf"
    shutil.copy(file, own)
    whole = module.convert

    def convert(*arguments: Any) -> None:
        whole(*arguments)
        with own.open("ab") as more:
            more.write(b"more")

    monkeypatch.setattr(module, "convert", convert)
    with pytest.raises(KvcalError, match="a: was changed while it was read"):
        converted([own], "a")
    assert names(cache) == ["gguf"]
