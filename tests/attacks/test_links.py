"""A stranger's folder in which names lead elsewhere: nothing outside it is written, read or sent."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from samples import artifact, rescored

from kvcal.artifacts import ArtifactError, KvcalError, load, save
from kvcal.artifacts.writing import write_atomically
from kvcal.calibrate.publish import _contents
from kvcal.runtime.planned import read_plan

SECRET = b"only the user's"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    path = tmp_path / "outside"
    path.write_bytes(SECRET)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(artifact(), tmp_path / "a", {"README.md": b"# card", "rank.png": b"png"})
    return tmp_path / "a"


def linked(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize("hard", [False, True])
def test_no_name_that_can_be_guessed_is_written_through(folder: Path, outside: Path, hard: bool) -> None:
    names = [path.name for path in folder.iterdir()] + ["score", "moments", "plan.json"]
    made = [
        f"{lead}{name}{end}" for name in names for lead in (".", "") for end in (".new", ".tmp", "~", ".part", ".lock")
    ]
    for name in {*made, "README.md", "rank.png", "plan.json"}:
        (folder / name).unlink(missing_ok=True)
        (folder / name).hardlink_to(outside) if hard else (folder / name).symlink_to(outside)
    found = load(folder)
    save(found.with_stage("score", rescored(found)), folder, {"README.md": b"# new", "rank.png": b"new"})
    write_atomically(folder / "plan.json", b"{}")
    assert outside.read_bytes() == SECRET
    assert (folder / "README.md").read_bytes() == b"# new" and not (folder / "README.md").is_symlink()


@pytest.mark.parametrize("which", ["manifest.json", "pca.*", "plan.json"])
@pytest.mark.parametrize("to", ["inside", "outside", "nothing"])
def test_a_linked_file_is_no_file_of_the_artifact(folder: Path, outside: Path, which: str, to: str) -> None:
    (folder / "plan.json").write_text('{"format": 1, "layers": []}')
    path = next(folder.glob(which))
    twin = folder / "twin"
    path.rename(twin)
    outside.write_bytes(twin.read_bytes())
    linked(path, {"inside": twin, "outside": outside, "nothing": folder / "gone"}[to])
    with pytest.raises(ArtifactError, match=rf"{path.name}: cannot be read .*is a link"):
        read_plan(load(folder))


@pytest.mark.parametrize("name", ["README.md", "rank.png", "clusters.png", "uptraining.png", "plan.json"])
def test_what_is_linked_is_not_sent(folder: Path, outside: Path, name: str) -> None:
    found = load(folder)
    linked(folder / name, outside)
    with pytest.raises(KvcalError, match=rf"{name}.*is a link"):
        _contents(found, "org/name")


def cached(folder: Path, repository: Path) -> Path:
    """As the Hub's client lays a repository out: a snapshot of links to blobs, which are named by their hashes."""
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in folder.iterdir():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(repository / "blobs" / digest)
        (snapshot / path.name).symlink_to(f"../../blobs/{digest}")
    return snapshot


def test_the_hubs_cache_is_read_though_it_is_made_of_links(folder: Path, tmp_path: Path) -> None:
    expected = load(folder).content_hash
    snapshot = cached(folder, tmp_path / "models--org--name")
    assert load(snapshot).content_hash == expected
    assert load(os.path.relpath(snapshot)).content_hash == expected


@pytest.mark.parametrize("trick", ["blob", "blobs", "name", "upwards"])
def test_a_folder_laid_out_as_the_hubs_cache_leads_nowhere_else(folder: Path, tmp_path: Path, trick: str) -> None:
    snapshot = cached(folder, tmp_path / "models--org--name")
    blobs, manifest = snapshot.parent.parent / "blobs", snapshot / "manifest.json"
    if trick == "blob":
        blob = manifest.resolve()
        blob.rename(tmp_path / "elsewhere")
        blob.symlink_to(tmp_path / "elsewhere")
    elif trick == "blobs":
        blobs.rename(tmp_path / "elsewhere")
        blobs.symlink_to(tmp_path / "elsewhere")
    else:
        manifest.resolve().rename(tmp_path / "elsewhere")
        linked(manifest, Path("../../../elsewhere" if trick == "upwards" else tmp_path / "elsewhere"))
    with pytest.raises(ArtifactError, match=r"manifest.json: cannot be read"):
        load(snapshot)
