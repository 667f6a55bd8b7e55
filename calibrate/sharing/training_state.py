"""Interrupted uptrainings: their state beside the artifact, safetensors and JSON, replaced in one step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from ...artifacts import KvcalError
from ...artifacts.folder import save_tensors, write_atomically
from .optimizer import Optimizer

Record = dict[str, float]
"""Of one step: see `Uptrained.history`."""


class TrainingState:
    """The folder `ARTIFACT.uptraining`. Every `save` replaces the previous state, which survives a failure."""

    def __init__(self, folder: Path, run: str):
        self.folder = folder
        self.run = run

    @classmethod
    def beside(cls, artifact: Path, run: str) -> TrainingState:
        artifact = artifact.absolute()  # "." has no name of its own
        return cls(artifact.with_name(f"{artifact.name}.uptraining"), run)

    def exists(self) -> bool:
        return (self.folder / "state.json").is_file()

    def save(self, optimizer: Optimizer, history: list[Record]) -> None:
        """Raises KvcalError when the disk does not take it; the previous state is then still there."""
        tensors, steps = optimizer.state()
        name = f"state-{len(history)}.safetensors"
        state = {"run": self.run, "history": history, "optimizer_steps": steps, "tensors": name}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_tensors(self.folder / name, tensors)
            write_atomically(self.folder / "state.json", json.dumps(state).encode())
            for old in self.folder.glob("state-*.safetensors"):
                if old.name != name:
                    old.unlink()
        except (OSError, SafetensorError) as error:
            raise KvcalError(f"{self.folder}: checkpoint cannot be written ({error}): free some space there") from error

    def load(self, optimizer: Optimizer) -> list[Record]:
        """Restore `optimizer`; returns the records of the steps that were done.

        Raises:
            KvcalError: the state is of another run, or damaged.
        """
        try:
            state: dict[str, Any] = json.loads((self.folder / "state.json").read_text("utf-8"))
            if state["run"] != self.run:
                raise KvcalError(
                    f"{self.folder}: interrupted uptraining of another model, text or settings: "
                    "repeat its command with --resume, or remove the folder"
                )
            name = Path(state["tensors"]).name
            optimizer.restore(load_file(self.folder / name), state["optimizer_steps"])
            return [{key: float(value) for key, value in record.items()} for record in state["history"]]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise KvcalError(
                f"{self.folder}: checkpoint is damaged ({error}): remove the folder and start again"
            ) from error

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
