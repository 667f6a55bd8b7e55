"""Interrupted uptrainings: their state beside the artifact, safetensors and JSON, replaced in one step."""

from __future__ import annotations

import contextlib
from pathlib import Path

from ...artifacts import ArtifactError, KvcalError
from ...artifacts.locks import FileLock
from ..state_files import read_state, remove_state, write_state
from .optimizer import Optimizer

Record = dict[str, float]
"""Of one step: see `Uptrained.history`."""


class TrainingState:
    """The folder `ARTIFACT.uptraining`. Every `save` replaces the previous state, which survives a failure."""

    def __init__(self, folder: Path, run: str):
        self.folder = folder
        self.run = run
        self.lock = FileLock(folder / "lock")

    @classmethod
    def beside(cls, artifact: Path, run: str) -> TrainingState:
        artifact = artifact.absolute()  # "." has no name of its own
        return cls(artifact.with_name(f"{artifact.name}.uptraining"), run)

    def exists(self) -> bool:
        return (self.folder / "state.json").is_file()

    def refuse_to_lose(self) -> None:
        """Raise KvcalError when there is a state."""
        if self.exists():
            raise KvcalError(
                f"{self.folder}: an interrupted uptraining is there: add --resume to continue it, or remove the folder"
            )

    def save(self, optimizer: Optimizer, history: list[Record]) -> None:
        """Raises KvcalError when the disk does not take it; the previous state is then still there."""
        stem = f"state-{len(history)}"
        self.lock.acquire()
        write_state(self.folder / "state.json", stem, {"run": self.run, "history": history}, optimizer.state())
        for old in self.folder.glob("state-*.safetensors"):
            if not old.name.startswith(f"{stem}."):
                with contextlib.suppress(OSError):  # it is in nobody's way
                    old.unlink()

    def load(self, optimizer: Optimizer) -> list[Record]:
        """Restore `optimizer`; returns the records of the steps that were done.

        Raises:
            KvcalError: the state is of another run, or damaged.
        """
        self.lock.acquire()
        try:
            state, tensors = read_state(self.folder / "state.json")
            if state["run"] != self.run:
                raise KvcalError(
                    f"{self.folder}: interrupted uptraining of another model, text or settings: "
                    "repeat its command with --resume, or remove the folder"
                )
            history = [{key: float(value) for key, value in record.items()} for record in state["history"]]
            optimizer.restore(tensors, steps_done=len(history))
            return history
        except (ArtifactError, OSError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise KvcalError(
                f"{self.folder}: checkpoint is damaged ({error}): remove the folder and start again"
            ) from error

    def remove(self) -> None:
        remove_state(self.folder, self.lock)
