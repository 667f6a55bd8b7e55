"""The state of an interrupted pass on disk, and the run that it belongs to."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..artifacts import ArtifactError, KvcalError
from ..artifacts.locks import FileLock
from .state_files import read_state, remove_state, write_state
from .statistics import StatisticsFitter

_COMMIT = re.compile(r"(?P<part>(?P<kind>[a-z]+)-\d+-of-(?P<size>\d+))\.(?P<done>\d+)\.json")


def run_id(model: Mapping[str, Any], data: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Names a run by everything that its result depends on."""
    text = json.dumps([model, data, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Checkpoint:
    """A folder beside the artifact-to-be, where each process of a run keeps its own part.

    A state is two files, PART.DONE.HASH.safetensors and PART.DONE.json. The second is the commit: it appears whole, and
    only after the first and the first's name are on the disk. Older states are deleted only then.
    """

    def __init__(self, folder: Path, run: str, kind: str = "blocks", rank: int = 0, size: int = 1):
        self.folder = folder
        self.run = run
        self._shares = (kind, str(size))
        self._part = f"{kind}-{rank}-of-{size}"
        self.lock = FileLock(folder / f"{self._part}.lock")

    @classmethod
    def beside(cls, output: Path, run: str, kind: str = "blocks", rank: int = 0, size: int = 1) -> Checkpoint:
        """
        Args:
            kind: what the processes of a run share out, "blocks" or "heads".
        """
        output = output.absolute()  # "." has no name of its own
        return cls(output.with_name(f"{output.name}.partial"), run, kind, rank, size)

    def exists(self) -> bool:
        """Whether any process of any run left a state here."""
        return any(self._commits())

    def newest(self) -> int:
        """Batches done in this part's newest state; 0: there is none.

        Raises:
            KvcalError: the states here are of processes that shared the work in another way.
        """
        commits = self._commits()
        for commit in commits:
            if commit.group("kind", "size") != self._shares:
                heads = " with --tp" if commit["kind"] == "heads" else ""
                raise KvcalError(
                    f"{self.folder}: interrupted run of {commit['size']} process(es){heads}, whose shares of the work "
                    "were others: resume it as it was started, or remove the folder"
                )
        return max((int(commit["done"]) for commit in commits if commit["part"] == self._part), default=0)

    def save(self, statistics: StatisticsFitter, done: int) -> None:
        """Raises KvcalError when the disk does not take it; the previous state is then still there."""
        numbers, tensors = statistics.state()
        self.lock.acquire()
        write_state(self._commit(done), f"{self._part}.{done}", {"run": self.run, **numbers}, tensors)

    def drop_older(self, done: int) -> None:
        """Delete this part's states but that of `done`, which all processes that need it have saved."""
        # Commits first: no state may name tensors that are gone.
        for kind in ("json", "safetensors"):
            for old in self.folder.glob(f"{self._part}.*.{kind}"):
                if not old.name.startswith(f"{self._part}.{done}."):
                    with contextlib.suppress(OSError):  # a state that stays does no harm
                        old.unlink()

    def load(self, done: int, reservoir: int, seed: int) -> StatisticsFitter:
        """The state after `done` batches of this part.

        Raises:
            KvcalError: the state is of another run, or damaged.
        """
        self.lock.acquire()
        try:
            state, tensors = read_state(self._commit(done))
            if state["run"] != self.run:
                raise KvcalError(
                    f"{self.folder}: interrupted run of another model, text or settings: "
                    "repeat its command with --resume, or remove the folder"
                )
            return StatisticsFitter.from_state(reservoir, seed, state, tensors)
        except (ArtifactError, OSError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise KvcalError(
                f"{self.folder}: checkpoint is damaged ({error}): remove the folder and start again"
            ) from error

    def remove(self) -> None:
        remove_state(self.folder, self.lock)

    def _commits(self) -> list[re.Match[str]]:
        names = sorted(path.name for path in self.folder.glob("*.json"))
        return [match for match in map(_COMMIT.fullmatch, names) if match]

    def _commit(self, done: int) -> Path:
        return self.folder / f"{self._part}.{done}.json"
