"""Find a Hub repository without waiting for a network that is not there.

The order is: the local Hub cache, then one HEAD request with a short time-out, and only then the Hub's
own client, which retries for many seconds to minutes before it gives up.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..artifacts import KvcalError, errors
from ..artifacts.missing import nearest

RepoType = Literal["model", "dataset"]

TIMEOUT_S = 3.0
_REVISION = re.compile(r"[\w+-][\w.+-]*(/[\w+-][\w.+-]*)*", re.ASCII)
_LONGEST_REVISION = 200
_COMMIT = re.compile("[0-9a-f]{40}([0-9a-f]{24})?")


@dataclass(frozen=True)
class Located:
    """Where a repository is to be had."""

    folder: Path | None
    """Its snapshot in the local Hub cache; None: load it online, by id and `revision`."""
    revision: str
    """The commit."""


def path_of(spec: str) -> Path:
    """The path that a specification names if it names one. Raises KvcalError: it can be none."""
    try:
        path = Path(spec).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, not to be looked at, or no such user after ~
        shown = spec if len(spec) <= 1000 else f"{spec[:1000]}…"
        raise KvcalError(f"{shown}: does not exist ({one_line(error)}): check the path") from None
    return path


def locate(
    repo_id: str,
    repo_type: RepoType = "model",
    revision: str | None = None,
    lacking: Callable[[Path], str | None] | None = None,
) -> Located:
    """Find a Hub repository: in the local cache first, online when that answers at once.

    Args:
        revision: branch, tag or commit; None: the default branch.
        lacking: says what a cached snapshot has not got that the caller needs, since a cache may hold
            some of the files only; None (or returning None) accepts it.

    Raises:
        KvcalError: not a valid id, not in the cache and not to be had online; within seconds.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise KvcalError(
            f"{repo_id}: does not exist here, and is not a Hub id (org/name) either: check the spelling"
        ) from None
    if revision is not None:
        check_revision(repo_id, revision)
    folder = cached(repo_id, repo_type, revision)
    missing = lacking(folder) if folder and lacking else None
    if folder and missing is None:
        return Located(folder, folder.name)

    name = f"{repo_id}@{revision}" if revision else repo_id
    state = f"only without {missing} in" if missing else "not in"
    near = nearest(repo_id)
    here = f"does not exist here (but {near} does)" if near else "does not exist here"
    looked = f"{repo_type} {name} {here} and is {state} the Hub cache ({constants.HF_HUB_CACHE})"
    download = f"hf download {repo_id}" + (" --repo-type dataset" if repo_type == "dataset" else "")
    download += f" --revision {revision}" if revision else ""
    advice = f"run `{download} --local-dir FOLDER` where there is a network and pass that folder"
    if constants.HF_HUB_OFFLINE:
        raise KvcalError(f"{looked}, and HF_HUB_OFFLINE is set: unset it, or {advice}")
    if problem := unreachable():
        raise KvcalError(f"{looked}, and {constants.ENDPOINT} does not answer ({problem}): {advice}")
    return Located(None, _commit(repo_id, repo_type, revision))


def check_revision(repo_id: str, revision: str) -> None:
    """Raise KvcalError for what is no revision: it becomes part of a path in the cache, and must not lead out of it."""
    good = len(revision) <= _LONGEST_REVISION and _REVISION.fullmatch(revision) and ".." not in revision
    if not good:
        shown = revision if len(revision) <= 100 else f"{revision[:100]}…"
        raise KvcalError(f"{repo_id}@{shown}: no name of a branch or tag, and no commit: check what is behind the @")


def fetch(repo_id: str, revision: str | None, names: Sequence[str]) -> Path:
    """The snapshot folder of a model in the cache, after downloading the files of these names or patterns.

    Raises:
        KvcalError: the network, the Hub or the disk failed.
    """
    from huggingface_hub import constants, snapshot_download

    try:
        patterns = list(names)
        folder = snapshot_download(repo_id, revision=revision, endpoint=constants.ENDPOINT, allow_patterns=patterns)
    except Exception as error:  # the network's, the server's or the disk's fault
        raise KvcalError(f"model {repo_id}: the download failed ({one_line(error)}): try again") from error
    return Path(folder)


def cached(repo_id: str, repo_type: RepoType, revision: str | None) -> Path | None:
    """The snapshot folder in the local Hub cache, complete or not; its name is the commit."""
    from huggingface_hub import constants

    # Not snapshot_download(local_files_only=True): that refuses what lacks any file of the repository,
    # also a second copy of the weights in another format that nobody needs.
    wanted = revision or constants.DEFAULT_REVISION
    parts = [f"{repo_type}s", *repo_id.split("/")]
    repository = Path(constants.HF_HUB_CACHE) / constants.REPO_ID_SEPARATOR.join(parts)
    ref = repository / "refs" / wanted
    snapshots = repository / "snapshots"
    noted = ref.read_text(errors="replace").strip() if ref.is_file() else wanted
    folder = snapshots / noted
    if "/" not in noted and ".." not in noted and folder.is_dir():
        return folder
    # What was downloaded by its commit, as we do, leaves no note which branch it is.
    newest_last = sorted(snapshots.glob("*/"), key=lambda path: path.stat().st_mtime) if revision is None else []
    return newest_last[-1] if newest_last else None


def unreachable() -> str | None:
    """Why the Hub cannot be reached, or None when it answered one HEAD request within `TIMEOUT_S`."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    outcome: list[str | None] = [f"no answer in {TIMEOUT_S:g} s"]

    def ask() -> None:
        try:
            status = get_session().head(constants.ENDPOINT, timeout=TIMEOUT_S).status_code
            outcome[0] = f"HTTP {status}" if status >= 500 else None
        except Exception as error:  # its class differs between versions of the Hub client
            outcome[0] = type(error).__name__

    # The client's time-out does not cover the look-up of the host name, a thread's does.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    return outcome[0]


def one_line(error: BaseException, limit: int = 200) -> str:
    """The gist of another library's exception, to be put in brackets into one of our lines."""
    text = errors.one_line(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _commit(repo_id: str, repo_type: RepoType, revision: str | None) -> str:
    """Ask the Hub which commit `revision` is, and thereby whether we may have it at all."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().repo_info(repo_id, repo_type=repo_type, revision=revision, timeout=10)
    except GatedRepoError:
        problem = "its owner has to grant access: accept the terms on its page, then `hf auth login`"
    except RepositoryNotFoundError:
        problem = "the Hub has no such repository, or a private one: check the spelling, or `hf auth login`"
    except RevisionNotFoundError:
        problem = f"the repository has no revision {revision!r}: check its branches and tags"
    except Exception as error:  # anything else is the network's or the server's fault, not ours
        problem = f"the Hub failed ({type(error).__name__}: {one_line(error)}): try again, or pass a folder"
    else:
        if _COMMIT.fullmatch(info.sha or ""):
            return str(info.sha)
        problem = f"the Hub answered with a commit {str(info.sha)[:80]!r}: try again, or pass a folder"
    raise KvcalError(f"{repo_type} {repo_id}: {problem}")
