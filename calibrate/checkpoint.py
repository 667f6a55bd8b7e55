"""Interrupted passes: their state on disk, and whose it is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from ..artifacts import KvcalError, Layer
from ..artifacts.folder import save_tensors, write_atomically
from .statistics import StatisticsFitter


def run_id(model: Mapping[str, Any], data: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Names a run by everything that its result depends on."""
    text = json.dumps([model, data, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Checkpoint:
    """A folder beside the artifact-to-be. `save` replaces the previous state in one step."""

    def __init__(self, folder: Path, run: str):
        self.folder = folder
        self.run = run

    @classmethod
    def beside(cls, output: Path, run: str) -> Checkpoint:
        output = output.absolute()  # "." has no name of its own
        return cls(output.with_name(f"{output.name}.partial"), run)

    def exists(self) -> bool:
        return (self.folder / "state.json").is_file()

    def save(self, statistics: StatisticsFitter, blocks_done: int) -> None:
        """Raises KvcalError when the disk does not take it; the previous state is then still there."""
        tensors = {"token": statistics.sample.token}
        counts = {}
        for (layer, quantity), fitter in statistics.moments.items():
            tensors[f"{layer}.{quantity}.mean"] = fitter.mean
            tensors[f"{layer}.{quantity}.scatter"] = fitter.scatter
            counts[f"{layer}.{quantity}"] = fitter.count
        for (layer, quantity), rows in statistics.rows.items():
            tensors[f"{layer}.{quantity}.rows"] = rows.rows
        state = {
            "run": self.run,
            "blocks_done": blocks_done,
            "layers": [dataclasses.asdict(layer) for layer in statistics.layers.values()],
            "counts": counts,
            "tensors": f"state-{blocks_done}.safetensors",
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_tensors(self.folder / state["tensors"], tensors)  # type: ignore[operator]
            write_atomically(self.folder / "state.json", json.dumps(state).encode())
            for old in self.folder.glob("state-*.safetensors"):
                if old.name != state["tensors"]:
                    old.unlink()
        except (OSError, SafetensorError) as error:
            raise KvcalError(f"{self.folder}: checkpoint cannot be written ({error}): free some space there") from error

    def load(self, statistics: StatisticsFitter) -> int:
        """Restore `statistics` (empty, of the same settings); returns the number of blocks already done.

        Raises:
            KvcalError: the state is of another run, or damaged.
        """
        try:
            state = json.loads((self.folder / "state.json").read_text())
            if state["run"] != self.run:
                raise KvcalError(
                    f"{self.folder}: interrupted run of another model, text or settings: "
                    "repeat its command with --resume, or remove the folder"
                )
            tensors = load_file(self.folder / state["tensors"])
            statistics.sample.token = tensors["token"]
            for fields in state["layers"]:
                statistics.add_layer(Layer(**fields), tensors[f"{fields['index']}.value.rows"].dtype)
            for (layer, quantity), fitter in statistics.moments.items():
                fitter.count = state["counts"][f"{layer}.{quantity}"]
                fitter.mean.copy_(tensors[f"{layer}.{quantity}.mean"])
                fitter.scatter.copy_(tensors[f"{layer}.{quantity}.scatter"])
            for (layer, quantity), rows in statistics.rows.items():
                rows.rows.copy_(tensors[f"{layer}.{quantity}.rows"])
            return int(state["blocks_done"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise KvcalError(
                f"{self.folder}: checkpoint is damaged ({error}): remove the folder and start again"
            ) from error

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
