"""Real processes of one job, as torchrun starts them, without the seconds that imports take: a server that has them
imported already forks each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "safetensors.torch",
        "torch.distributed.tensor",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.llama.modeling_llama",
        "transformers.distributed.tensor_parallel",
        "matplotlib.backends.backend_agg",
        "matplotlib.figure",
        "sklearn.cluster",
        "sklearn.metrics",
        "faiss",
        "kvcal.calibrate.one_pass",
        "kvcal.calibrate.cli.evaluate",
    ]
)


@dataclass(frozen=True)
class Job:
    processes: list[Any]
    folder: Path
    store: Any
    """Kept by the starter, as by torchrun: it outlives every rank."""

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        if self.processes[rank].is_alive():
            os.kill(self.processes[rank].pid, number)

    def wait(self, seconds: float = 60) -> list[int]:
        """Exit codes, by rank; -9 of those that were killed. Fails when one hangs."""
        for process in self.processes:
            process.join(seconds)
        hanging = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for rank in hanging:
            self.kill(rank)
        assert not hanging, f"ranks {hanging} still ran after {seconds} s"
        return [process.exitcode for process in self.processes]

    def until(self, condition: Callable[[], Any]) -> None:
        """Wait for something that the running processes bring about."""
        while not condition():
            assert any(process.is_alive() for process in self.processes), self.err
            time.sleep(0.01)

    def end(self) -> list[int]:
        """As torchrun does when one rank failed: end the others. Exit codes, by rank."""
        for rank in range(len(self.processes)):
            self.kill(rank, signal.SIGTERM)
        return self.wait()

    def out(self, rank: int) -> str:
        path = self.folder / f"{rank}.out"
        return path.read_text() if path.exists() else ""  # which the process makes

    @property
    def err(self) -> list[str]:
        """Lines of all ranks' stderr but warnings of libraries."""
        lines = [line for path in sorted(self.folder.glob("*.err")) for line in path.read_text().splitlines()]
        return [line for line in lines if "[W" not in line and "Warning" not in line]


def start(folder: Path, arguments: list[Any] | Callable[[int], list[Any]], size: int, prelude: str = "") -> Job:
    """Run the command line `arguments`, or that of each rank, in `size` processes; `prelude` is Python that runs in
    each before it."""
    folder.mkdir(parents=True, exist_ok=True)
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = []
    for rank in range(size):
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": store.port}
        words_of_torchrun = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        variables = {name: str(value) for name, value in numbers.items()} | words_of_torchrun
        words = [str(word) for word in (arguments(rank) if callable(arguments) else arguments)]
        process = _SERVER.Process(target=_run, args=(variables, words, str(folder / str(rank)), prelude))
        process.start()
        processes.append(process)
    return Job(processes, folder, store)


def _run(variables: dict[str, str], arguments: list[str], output: str, prelude: str) -> None:
    for stream, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{output}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", closefd=False)  # noqa: SIM115
    os.environ.update(variables)
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from kvcal.calibrate.__main__ import main

    torch.set_num_threads(1)
    exec(prelude, {"rank": int(variables["RANK"])})
    sys.argv = ["calibrate", *arguments]
    main()
