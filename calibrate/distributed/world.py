"""The processes of one job: their ranks, how they exchange results, and the one line that says why a job failed."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from ...artifacts import KvcalError
from .peers import Peers

TRANSFER_SECONDS = 1800.0
"""For one tensor from one rank to another, waiting for the other included; a lost rank is noticed within seconds."""
JOIN_SECONDS, LONE_JOIN_SECONDS = 300.0, 45.0
"""For all ranks to come, under torchrun and without it."""
GRACE_SECONDS = 30.0
"""For a rank to end by itself after another was lost."""


class PeerLost(KvcalError):
    """Another process of the job is gone. The user has been told already."""


class Finished(BaseException):
    """A rank other than 0 has done its share. Nothing on the way should take it for an error."""


class World:
    """Rank and number of the processes of a job; `SINGLE` is the job of one, whose methods cost nothing."""

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None):
        self.rank = rank
        self.size = size
        self.lost: int | None = None
        """The rank that is gone, once one is."""
        self._store = store
        self._claims = store.clone() if store is not None else None  # a store's call blocks its other callers
        self._peers: Peers | None = None
        self._telling = threading.RLock()
        self._rounds = 0

    def watch(self, host: str, patience: float) -> None:
        """From now on, find out when another rank is gone; all must come within `patience` seconds."""
        self._peers = Peers(
            self.rank,
            self.size,
            host,
            post=self._store.set,
            fetch=lambda key: self._store.get(key).decode(),
            on_lost=self._on_lost,
            patience=patience,
        )

    @property
    def first(self) -> bool:
        return self.rank == 0

    def deal(self, count: int) -> range:
        """Which of `count` pieces of work are this rank's: every size-th."""
        return range(self.rank, count, self.size)

    def check(self) -> None:
        """Raises PeerLost when another rank is gone."""
        if self.lost is not None:
            raise PeerLost(self._gone(self.lost))

    def exchange(self, value: Any) -> list[Any]:
        """What each rank gave, by rank, through JSON. Waits for the slowest rank as long as it lives."""
        if self.size == 1:
            return [value]
        self._rounds += 1
        with self.talking():
            self._store.set(f"{self._rounds} {self.rank}", json.dumps(value))
            return [json.loads(self._await(f"{self._rounds} {rank}")) for rank in range(self.size)]

    def agree(self, value: Any) -> Any:
        """What rank 0 gave, on every rank."""
        return self.exchange(value if self.first else None)[0] if self.size > 1 else value

    def agree_on(self, value: Mapping[str, str]) -> None:
        """Raise KvcalError, on every rank alike, when another rank has other entries than rank 0."""
        first, *others = self.exchange(value)
        for rank, other in enumerate(others, 1):
            for name in sorted(first.keys() | other.keys(), key=lambda name: (name != "command", name)):
                ours, theirs = first.get(name, "nothing"), other.get(name, "nothing")
                if ours != theirs:
                    raise KvcalError(
                        f"rank {rank} of {self.size} was started otherwise than rank 0 ({name} {theirs[:200]!r}, "
                        f"{ours[:200]!r} on rank 0): start all of them with one command, of the same installation"
                    )

    def send(self, to: int, tag: str, meta: Any, tensors: Mapping[str, Tensor]) -> None:
        """Hand a rank JSON-able `meta` and tensors; it must `receive` them under the same tag."""
        with self.talking():
            self._store.set(f"{tag} {self.rank}>{to}", json.dumps([meta, _shapes(tensors)]))
            for tensor in tensors.values():
                torch.distributed.send(_bytes(tensor), to)

    def receive(self, source: int, tag: str) -> tuple[Any, dict[str, Tensor]]:
        with self.talking():
            meta, shapes = json.loads(self._await(f"{tag} {source}>{self.rank}"))
            tensors = _empty(shapes)
            for tensor in tensors.values():
                torch.distributed.recv(_bytes(tensor), source)
            return meta, tensors

    def broadcast(self, meta: Any, tensors: Mapping[str, Tensor], source: int = 0) -> tuple[Any, dict[str, Tensor]]:
        """JSON-able `meta` and tensors that rank `source` gave; the tensors are on the CPU."""
        if self.size == 1:
            return meta, dict(tensors)
        mine = self.rank == source
        meta, shapes = self.exchange([meta, _shapes(tensors)] if mine else None)[source]
        found = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()} if mine else _empty(shapes)
        with self.talking():
            for tensor in found.values():
                torch.distributed.broadcast(_bytes(tensor), source)
        return meta, found

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, which have the same shape and dtype, by rank."""
        found = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        with self.talking():
            torch.distributed.all_gather([_bytes(buffer) for buffer in found], _bytes(tensor))
        return found

    def claim(self) -> bool:
        """Whether this is the first rank to report why the job fails: the others keep silent."""
        if self._claims is None:
            return True
        with self._telling:
            try:
                return int(self._claims.add("told", 1)) == 1
            except RuntimeError:  # the store went with the process that kept it
                return True

    @contextmanager
    def talking(self) -> Iterator[None]:
        """A context for what waits for other ranks: the loss of one raises PeerLost."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or isinstance(error, (KvcalError, torch.OutOfMemoryError)):
                raise
            for _ in range(20):  # which rank it was arrives a moment later
                if self.lost is not None:
                    raise PeerLost(self._gone(self.lost)) from error
                time.sleep(0.1)
            raise

    def leave_to_first(self) -> None:
        """What follows is rank 0's alone: the others skip to the end of the job."""
        if not self.first:
            raise Finished

    def leave(self) -> None:
        """End together: returns when every rank has come here."""
        if self._peers is None:
            return
        self.exchange("done")
        self._peers.leave()
        if self.first:  # whoever keeps the store ends last
            for rank in range(1, self.size):
                self._await(f"left {rank}")
        else:
            self._store.set(f"left {self.rank}", "")
        torch.distributed.destroy_process_group()

    def _await(self, key: str) -> bytes:
        pause = 0.001
        while not self._store.check([key]):
            self.check()
            time.sleep(pause)
            pause = min(0.1, 2 * pause)
        found: bytes = self._store.get(key)
        return found

    def _gone(self, rank: int) -> str:
        return (
            f"rank {rank} of {self.size} is gone (killed, out of memory, or its machine is), so the others stop: "
            "repeat the command to go on (pca: with --resume)"
        )

    def _on_lost(self, rank: int) -> None:
        with self._telling:  # so that the main thread does not find the line claimed, and end, before it is printed
            if self.claim():
                print(f"Error: {self._gone(rank)}", file=sys.__stderr__, flush=True)
        self.lost = rank
        # Between two batches this rank notices by itself; blocked in a kernel or a transfer it may not.
        timer = threading.Timer(GRACE_SECONDS, os._exit, [2])
        timer.daemon = True
        timer.start()


SINGLE = World()


def launched() -> int:
    """The number of processes that torchrun (or what sets the same variables) started for this job; 1 without it."""
    try:
        return int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        raise KvcalError(f"WORLD_SIZE={os.environ['WORLD_SIZE']}: expected a number; start with torchrun") from None


def join() -> World:
    """Meet the other processes of this job.

    Raises:
        KvcalError: they cannot be reached.
    """
    # torchrun ends all processes when one fails; without it nobody knows whether one that has not come yet will.
    patience = JOIN_SECONDS if "TORCHELASTIC_RUN_ID" in os.environ else LONE_JOIN_SECONDS
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, rank, size = next(torch.distributed.rendezvous("env://", timeout=timedelta(seconds=patience)))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        world = World(rank, size, torch.distributed.PrefixStore(f"kvcal {attempt}", store))
        world.watch(os.environ["MASTER_ADDR"], patience)
        torch.distributed.init_process_group(
            backend,
            store=torch.distributed.PrefixStore(f"torch {attempt}", store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=TRANSFER_SECONDS),
        )
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise KvcalError(f"the processes of this job do not find one another ({reason}): use torchrun") from error
    return world


def _shapes(tensors: Mapping[str, Tensor]) -> list[Any]:
    return [[name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in tensors.items()]


def _empty(shapes: list[Any]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, dtype, shape in shapes}


def _bytes(tensor: Tensor) -> Tensor:
    """A tensor as bytes, since gloo does not take every dtype; of a contiguous CPU tensor its own memory."""
    flat = tensor.detach().cpu().contiguous().flatten()
    # One element may have any stride and still be contiguous; such a tensor is only ever read from.
    return (flat if flat.stride(0) == 1 else flat.new_empty(flat.shape).copy_(flat)).view(torch.uint8)
