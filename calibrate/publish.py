"""Artifacts on the Hub: verified here, sent there as one commit, so that every revision is a whole artifact."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifacts import Artifact, KvcalError, load
from ..artifacts import slim as slim_form
from ..artifacts.errors import one_line
from ..artifacts.manifest import FILE_NAME, MANIFEST, manifest_bytes
from ..artifacts.packages import require
from ..artifacts.plain_files import read_plain
from ..runtime import hub
from ..runtime.planned import FILE as PLAN
from ..runtime.planned import has_plan, read_plan
from .card import PLACE, card_files, slim_note

CARD, FIGURES = "README.md", ("rank.png", "clusters.png", "uptraining.png")


@dataclass(frozen=True)
class Pushed:
    """What is on the Hub now."""

    repo_id: str
    commit: str
    """The revision by which `load` finds exactly this artifact."""
    url: str
    files: tuple[str, ...]


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    branch: str | None = None,
    private: bool = False,
    message: str | None = None,
    slim: bool = False,
) -> Pushed:
    """Check an artifact and upload it; the repository and the branch are made when they are not there.

    Its manifest, the stage files that it names, its plan, the card and our figures are sent, nothing else that lies
    in the folder. Stage files of an earlier push that the manifest no longer names, and a plan that is not there any
    more, are removed by the same commit.

    Args:
        repo_id: `org/name` of a model repository.
        branch: None: the default one.
        private: of a repository that is made now; a public one that is there already is refused.
        message: of the commit.
        slim: send the slim form (`artifacts.slim`), which is written nowhere here.

    Raises:
        KvcalError: the artifact does not hold, no token, no permission, no network, or the Hub failed; no revision
            there is then incomplete.
    """
    require("huggingface_hub", to="publish an artifact")
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

    found = load(folder)
    artifact = slim_form(found) if slim else found
    contents, content_hash = _contents(artifact, repo_id)
    _check_online(repo_id, branch)
    api = HfApi(endpoint=constants.ENDPOINT)
    with _in_one_line(repo_id):
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if branch is not None:
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        before = api.model_info(repo_id, revision=branch)
        if private and before.private is False:
            raise KvcalError(
                f"{repo_id}: is there and public: make it private in its settings on the Hub, or leave --private out"
            )
        additions = [CommitOperationAdd(name, content) for name, content in contents.items()]
        api.preupload_lfs_files(repo_id, additions, revision=branch, free_memory=False)
        _check_sent(artifact, additions)
        present = {file.rfilename for file in before.siblings or ()}
        old = sorted(name for name in present - contents.keys() if FILE_NAME.fullmatch(name) or name == PLAN)
        commit = api.create_commit(
            repo_id,
            [*additions, *(CommitOperationDelete(name) for name in old)],
            commit_message=one_line(message or f"kvcal artifact of {artifact.model.id[:200]}, {content_hash}"),
            revision=branch,
            parent_commit=before.sha,
        )
    return Pushed(repo_id, commit.oid, f"{constants.ENDPOINT}/{repo_id}/tree/{commit.oid}", tuple(contents))


def _contents(artifact: Artifact, repo_id: str) -> tuple[dict[str, bytes | str], str]:
    """(name on the Hub -> bytes, or the path of a file; the content hash of what is there then)

    Args:
        artifact: as it lies in its folder, or its slim form.
    """
    folder = artifact.folder
    assert folder is not None
    manifest = _plain(folder / MANIFEST)
    if json.loads(manifest).get("content_hash") != artifact.content_hash:
        raise KvcalError(f"{folder}: was changed meanwhile by another process: repeat the command")
    content_hash = str(artifact.content_hash)
    files = {name: stage.tensors.file for name, stage in artifact.stages.items()}  # type: ignore[attr-defined]
    made_slim = artifact.slim_of is not None and artifact.slim_of.content_hash == artifact.content_hash
    if made_slim:
        manifest, content_hash = manifest_bytes(artifact, files)
    contents: dict[str, bytes | str] = {MANIFEST: manifest}
    contents |= {file.file: str(folder / file.file) for file in files.values()}
    contents |= {name: _plain(folder / name) for name in FIGURES if os.path.lexists(folder / name)}
    if has_plan(artifact):
        read_plan(artifact)  # raises where it is none
        contents[PLAN] = _plain(folder / PLAN)
    card = folder / CARD
    text = _plain(card).decode("utf-8", errors="replace") if os.path.lexists(card) else ""
    if not _has_front_matter(text):
        made = card_files(artifact)
        contents |= made
        text = made[CARD].decode()
    elif made_slim:
        text += slim_note(artifact)
    contents[CARD] = text.replace(PLACE, repo_id).encode()
    return contents, content_hash


def _plain(path: Path) -> bytes:
    """The content of a file to be sent, no link: that could lead to anything of the user's."""
    try:
        return read_plain(path)
    except OSError as error:
        raise KvcalError(
            f"{path}: cannot be sent ({error.strerror}): put the file itself there, or remove it"
        ) from None


def _has_front_matter(card: str) -> bool:
    from huggingface_hub import ModelCard

    try:
        return bool(ModelCard(card).data.to_dict().get("library_name"))
    except Exception:  # a person may have written anything there
        return False


def _check_online(repo_id: str, branch: str | None) -> None:
    """Raise KvcalError within seconds for what would make the upload fail after minutes."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
        valid = "/" in repo_id
    except HFValidationError:
        valid = False
    if not valid:
        raise KvcalError(f"{repo_id}: not a Hub id: give org/name, or your user name before the slash")
    if branch is not None:
        hub.check_revision(repo_id, branch)
    if constants.HF_HUB_OFFLINE:
        raise KvcalError(f"{repo_id}: HF_HUB_OFFLINE is set, nothing can be sent: unset it")
    if not get_token():
        raise KvcalError(f"{repo_id}: no Hub token here: `hf auth login`, or set HF_TOKEN to one with write access")
    if problem := hub.unreachable():
        raise KvcalError(f"{repo_id}: {constants.ENDPOINT} does not answer ({problem}): try again with a network")


def _check_sent(artifact: Artifact, additions: list[Any]) -> None:
    """A file that changed between our check and the upload must not get a commit."""
    expected = {stage.tensors.file.file: stage.tensors.file.sha256 for stage in artifact.stages.values()}  # type: ignore[attr-defined]
    for addition in additions:
        name, sent = addition.path_in_repo, addition.upload_info.sha256.hex()
        if sent != expected.get(name, sent):
            raise KvcalError(f"{artifact.folder}: {name} was changed while it was sent: repeat the command")


@contextmanager
def _in_one_line(repo_id: str) -> Iterator[None]:
    """What the Hub's client raises, as a line of ours with advice."""
    try:
        yield
    except KvcalError:
        raise
    except Exception as error:  # the client raises its own, its HTTP library's, OSError, ValueError and RuntimeError
        raise KvcalError(f"{repo_id}: {_problem(error)}; every revision there is still whole") from error


def _problem(error: BaseException) -> str:
    status = next((code for cause in _causes(error) if (code := _status(cause))), None)
    said = hub.one_line(error)
    if status == 401:
        return "the Hub does not accept the token: `hf auth login` with a valid one, or set HF_TOKEN"
    if status == 403:
        return f"the token may not write there ({said}): take one with write access, or another name before the slash"
    if status == 404:
        return "the Hub knows no such user, organisation, repository or branch: check the spelling"
    if status in (409, 412):
        return "was changed there meanwhile by somebody else: repeat the command"
    return f"the upload failed ({said}): repeat the command"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
