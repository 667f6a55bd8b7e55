"""An artifact goes to the Hub and comes back the same; what goes wrong on the way leaves the Hub as it was."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import ModelCard, constants
from samples import artifact
from stand_in_hub import Repository, StandInHub

from kvcal.artifacts import Artifact, ArtifactError, KvcalError, load, save, slim
from kvcal.calibrate.card import card_files
from kvcal.calibrate.cli import cli
from kvcal.calibrate.publish import push
from kvcal.runtime import load as load_anywhere
from kvcal.runtime.planned import has_plan, read_plan

REPO = "org/tiny-kvcal"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandInHub]:
    """A Hub of this test's own that its process talks to with a token that may write, and an empty cache."""
    with StandInHub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        # Made from the endpoint when the client is imported, as the endpoint is from the environment.
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        yield server


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two artifacts of one shape with cards and figures, which take a while to draw; for copies."""
    base = tmp_path_factory.mktemp("drawn")
    return [_saved(artifact(seed), base / str(seed)) for seed in (0, 1)]


@pytest.fixture
def folder(drawn: list[Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(drawn[0], tmp_path / "tiny"))


@pytest.fixture
def other(drawn: list[Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(drawn[1], tmp_path / "other"))


def _saved(made: Artifact, folder: Path) -> Path:
    save(made, folder, card_files(made))
    return folder


def _tensors(found: Artifact) -> dict[str, torch.Tensor]:
    return {f"{name}/{key}": stage.tensors[key] for name, stage in found.stages.items() for key in stage.tensors}


def _same(first: Artifact, second: Artifact) -> bool:
    ours, theirs = _tensors(first), _tensors(second)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_pushed_and_loaded_it_is_the_same(hub: StandInHub, folder: Path) -> None:
    pushed = push(folder, REPO)
    found = load_anywhere(f"{REPO}@{pushed.commit}")
    assert found.content_hash == load(folder).content_hash and _same(found, load(folder))
    for path in folder.glob("*.safetensors"):
        assert (found.folder / path.name).read_bytes() == path.read_bytes()
    assert hub.repositories[REPO].branches == {"main": pushed.commit}
    assert len(hub.repositories[REPO].messages) == 2  # of the Hub when it made the repository, and ours


def test_a_pinned_revision_stays_what_it_was(hub: StandInHub, folder: Path, other: Path) -> None:
    first = push(folder, REPO)
    was = load(folder)
    second = push(other, REPO)
    assert _same(load_anywhere(f"{REPO}@{first.commit}"), was)
    assert _same(load_anywhere(f"{REPO}@main"), load(other))
    assert _same(load_anywhere(REPO, revision=second.commit), load(other))
    assert _same(load_anywhere(f"{REPO}@{first.commit}"), was)
    # The first one's stage files left the branch with the second commit.
    assert {name for name in hub.repositories[REPO].commits[second.commit] if name.endswith(".safetensors")} == {
        path.name for path in other.glob("*.safetensors")
    }


def test_a_branch_beside_the_main_one(hub: StandInHub, folder: Path, other: Path) -> None:
    main = push(folder, REPO)
    branch = push(other, REPO, branch="second", message="another seed")
    assert hub.repositories[REPO].branches == {"main": main.commit, "second": branch.commit}
    assert hub.repositories[REPO].messages[-1] == "another seed"
    assert _same(load_anywhere(f"{REPO}@second"), load(other))


def test_the_same_again_is_no_new_commit(hub: StandInHub, folder: Path) -> None:
    assert push(folder, REPO).commit == push(folder, REPO).commit
    assert len(hub.repositories[REPO].commits) == 2


def test_a_plan_goes_with_the_artifact_and_leaves_with_it(hub: StandInHub, folder: Path) -> None:
    plan = {"format": 1, "layers": [{"method": "loki", "keep": 0.5}, None]}
    (folder / "plan.json").write_text(json.dumps(plan))
    first = push(folder, REPO)
    assert read_plan(load_anywhere(f"{REPO}@{first.commit}")) == plan
    (folder / "plan.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"plan\.json: cannot be read"):
        push(folder, REPO)
    (folder / "plan.json").unlink()
    assert not has_plan(load_anywhere(f"{REPO}@{push(folder, REPO).commit}"))


def test_only_the_artifact_is_sent(hub: StandInHub, folder: Path) -> None:
    for name in (".env", "notes.txt", "old.12345678.safetensors"):
        (folder / name).write_text("secret")
    push(folder, REPO)
    sent = set(hub.repositories[REPO].commits[hub.repositories[REPO].branches["main"]]) - {".gitattributes"}
    stages = {path.name for path in folder.glob("*.safetensors")} - {"old.12345678.safetensors"}
    assert sent == {"manifest.json", "README.md", "rank.png", *stages}


def test_the_slim_form_goes_there_and_back(hub: StandInHub, folder: Path, tmp_path: Path) -> None:
    """Nothing is written in the folder; what comes back is what `slim` makes, and can be pushed itself."""
    plan = {"format": 1, "layers": [{"method": "loki", "keep": 0.5}, None]}
    (folder / "plan.json").write_text(json.dumps(plan))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    pushed = push(folder, REPO, slim=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    sent = hub.repositories[REPO].commits[pushed.commit]
    assert {name.split(".")[0] for name in sent if name.endswith(".safetensors")} == {"pca", "score"}
    made = save(slim(load(folder)), tmp_path / "slim")
    found = load_anywhere(f"{REPO}@{pushed.commit}")
    assert found.content_hash == made.content_hash and _same(found, made) and read_plan(found) == plan
    assert found.slim_of is not None and found.slim_of.content_hash == load(folder).content_hash
    assert made.content_hash in hub.repositories[REPO].messages[-1]
    card = sent["README.md"].decode()
    assert "**Slim**: moments and reservoir" in card and found.slim_of.content_hash in card
    assert ModelCard(card).data.library_name == "kvcal"
    again = push(save(found, tmp_path / "again").folder, "org/again")
    assert load_anywhere(f"org/again@{again.commit}").content_hash == made.content_hash


def test_slim_and_full_take_turns_on_a_branch(hub: StandInHub, folder: Path) -> None:
    """Each commit has its own stage files only."""
    for slimmed in (False, True, False):
        pushed = push(folder, REPO, slim=slimmed)
        sent = hub.repositories[REPO].commits[pushed.commit]
        stages = {name.split(".")[0] for name in sent if name.endswith(".safetensors")}
        assert stages == {"pca", "score", *(() if slimmed else ("moments", "reservoir"))}
        assert ("**Slim**" in sent["README.md"].decode()) == slimmed
        assert (load_anywhere(f"{REPO}@{pushed.commit}").slim_of is not None) == slimmed


def test_a_card_of_ones_own_is_kept_and_says_that_it_is_slim(hub: StandInHub, folder: Path) -> None:
    own = "---\nlibrary_name: kvcal\n---\n\n# Mine\n"
    (folder / "README.md").write_text(own)
    pushed = push(folder, REPO, slim=True)
    sent = hub.repositories[REPO].commits[pushed.commit]["README.md"].decode()
    assert sent.startswith(own) and "**Slim**: moments and reservoir" in sent


def test_what_is_slim_already_is_sent_as_it_is(hub: StandInHub, folder: Path, tmp_path: Path) -> None:
    made = _saved(slim(load(folder)), tmp_path / "slim")
    with_option, without = (push(made, f"org/{name}", slim=name == "a") for name in ("a", "b"))
    one, other = (hub.repositories[pushed.repo_id].commits[pushed.commit] for pushed in (with_option, without))
    assert {name: data for name, data in one.items() if name != "README.md"} == {
        name: data for name, data in other.items() if name != "README.md"
    }
    assert one["README.md"].count(b"**Slim**") == other["README.md"].count(b"**Slim**") == 1


@pytest.mark.parametrize("revision", [None, "f" * 40])
def test_the_card_is_what_the_hub_reads(hub: StandInHub, tmp_path: Path, revision: str | None) -> None:
    """`base_model` must name a model of the Hub: one with a commit."""
    made = artifact()
    of_the_hub = replace(made, model=replace(made.model, revision=revision))
    pushed = push(_saved(of_the_hub, tmp_path / "made"), REPO)
    text = hub.repositories[REPO].commits[pushed.commit]["README.md"].decode()
    metadata = ModelCard(text).data.to_dict()
    assert metadata["library_name"] == "kvcal" and "kv-cache" in metadata["tags"]
    assert metadata.get("base_model") == ("org/model" if revision else None)
    assert f'load("{REPO}")' in text


@pytest.mark.parametrize("card", [None, "no front matter\n", "---\n[unclosed\n---\n"])
def test_a_card_that_the_hub_would_refuse_is_made_again(hub: StandInHub, folder: Path, card: str | None) -> None:
    (folder / "README.md").unlink()
    if card is not None:
        (folder / "README.md").write_text(card)
    pushed = push(folder, REPO)
    assert ModelCard(hub.repositories[REPO].commits[pushed.commit]["README.md"].decode()).data.library_name == "kvcal"


def test_private(hub: StandInHub, folder: Path) -> None:
    push(folder, REPO, private=True)
    assert hub.repositories[REPO].private
    hub.repositories["org/public"] = Repository()
    hub.repositories["org/public"].commit("main", {}, "")
    with pytest.raises(KvcalError, match="org/public: is there and public"):
        push(folder, "org/public", private=True)
    assert len(hub.repositories["org/public"].commits) == 1


def _refused(folder: Path, repo_id: str = REPO) -> str:
    result = CliRunner().invoke(cli, ["push", str(folder), repo_id])
    assert result.exit_code == 2 and result.stdout == "", (result.output, result.exception)
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    return line


@pytest.mark.parametrize(
    ("where", "status", "message"),
    [
        ("/large/", 403, "may not write"),
        ("/large/", 400, "upload failed"),
        ("/verify", 404, "no such"),
        ("/preupload/", 403, "may not write"),
        ("/commit/", 412, "meanwhile by somebody else"),
        ("/commit/", 500, "upload failed"),
        ("/commit/", 0, "upload failed"),
        ("/api/validate-yaml", 400, "upload failed"),
    ],
)
def test_a_push_that_fails_half_way_changes_no_revision(
    hub: StandInHub, folder: Path, other: Path, where: str, status: int, message: str
) -> None:
    first = push(folder, REPO)
    hub.fault = lambda method, path: status if where in path else None
    assert message in _refused(other)
    assert hub.repositories[REPO].branches == {"main": first.commit}
    hub.fault = lambda method, path: None
    assert _same(load_anywhere(f"{REPO}@main"), load(folder))
    push(other, REPO)
    assert _same(load_anywhere(f"{REPO}@main"), load(other))


def test_somebody_else_commits_meanwhile(hub: StandInHub, folder: Path, other: Path) -> None:
    push(folder, REPO)
    repository = hub.repositories[REPO]

    def somebody_else(method: str, path: str) -> None:
        if "/commit/" in path:
            repository.commit("main", {"README.md": b"theirs"}, "theirs")

    hub.fault = somebody_else
    assert "meanwhile" in _refused(other)
    assert repository.commits[repository.branches["main"]] == {"README.md": b"theirs"}


def test_tokens(hub: StandInHub, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    for token, advice in (("", "no Hub token"), ("hf_wrong", "does not accept"), ("hf_reader", "may not write")):
        monkeypatch.setenv("HF_TOKEN", token)
        assert advice in _refused(folder)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    assert "may not write" in _refused(folder, "others/name")
    assert hub.repositories == {}


def test_no_network_and_bad_ids(hub: StandInHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("name", "a/b/c", "org/na me"):
        assert "not a Hub id" in _refused(folder, name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{probe.getsockname()[1]}")
        assert "does not answer" in _refused(folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in _refused(folder)
    assert hub.requests == []


def test_a_damaged_artifact_is_not_sent(hub: StandInHub, folder: Path) -> None:
    path = next(folder.glob("pca.*"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert path.name in _refused(folder)
    assert hub.requests == []


def test_a_file_that_changes_while_it_is_sent_gets_no_commit(hub: StandInHub, folder: Path) -> None:
    path = next(folder.glob("pca.*"))

    def change(method: str, route: str) -> None:
        if "/preupload/" in route:
            path.write_bytes(path.read_bytes()[:-1] + b"x")

    hub.fault = change
    assert "changed while it was sent" in _refused(folder)
    assert not any("/commit/" in request for request in hub.requests)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (f"{REPO}@nowhere", "no revision 'nowhere'"),
        ("org/absent", "no such repository"),
        ("org/model", r"not a kvcal artifact \(no manifest.json\)"),
    ],
)
def test_what_the_hub_has_not_got(hub: StandInHub, folder: Path, source: str, message: str) -> None:
    push(folder, REPO)
    hub.repositories["org/model"] = Repository()
    hub.repositories["org/model"].commit("main", {"model.safetensors": b"x" * 1000}, "a model, not an artifact")
    with pytest.raises(KvcalError, match=message):
        load_anywhere(source)
    assert not any("/resolve/" in request and "model.safetensors" in request for request in hub.requests)


def test_a_download_that_breaks_and_is_repeated(hub: StandInHub, folder: Path, monkeypatch: Any) -> None:
    pushed = push(folder, REPO)
    hub.fault = lambda method, path: 403 if "/resolve/" in path and "pca" in path else None
    with pytest.raises(KvcalError, match=f"{REPO}: the download failed"):
        load_anywhere(f"{REPO}@{pushed.commit}")
    hub.fault = lambda method, path: None
    assert _same(load_anywhere(f"{REPO}@{pushed.commit}"), load(folder))


def test_two_revisions_in_one_call(hub: StandInHub) -> None:
    with pytest.raises(ArtifactError, match="give one of them"):
        load_anywhere(f"{REPO}@one", revision="two")


def test_as_users_run_it(folder: Path, tmp_path: Path) -> None:
    """Processes of their own, configured by nothing but the environment."""
    with StandInHub() as server:
        settings = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_writer"}
        environment = {**os.environ, **settings, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        script = f"from kvcal.runtime import load; print(load({REPO!r}).content_hash)"
        for command in (["-m", "kvcal.calibrate", "push", str(folder), REPO], ["-c", script]):
            done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == load(folder).content_hash


def test_the_names_of_transformers_do_the_same(hub: StandInHub, tmp_path: Path) -> None:
    made = artifact()
    with pytest.raises(ArtifactError, match="not saved yet: call save_pretrained"):
        made.push_to_hub(REPO)
    saved = made.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "plan.json").write_text(json.dumps({"format": 1, "layers": [None, None]}))
    again = Artifact.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "again")
    assert again.content_hash == saved.content_hash and read_plan(again)["layers"] == [None, None]
    pushed = again.push_to_hub(REPO, commit_message="ours")
    assert hub.repositories[REPO].messages[-1] == "ours"
    assert _same(Artifact.from_pretrained(REPO, revision=pushed.commit), made)
