"""One decode step, captured in a CUDA graph where that is possible, and run again and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .sampling import Sampler


class State:
    """What a step reads and writes beside the cache, at fixed addresses."""

    def __init__(self, position: Tensor, most: int, sampler: Sampler, ends: Tensor | None, padding: int, seed: int):
        """
        Args:
            position: [B, 1] of the token that is sampled first.
            ends: [n] ids that end a row.
        """
        device, rows = position.device, position.shape[0]
        self.sampler, self.ends, self.padding = sampler, ends, padding
        self.generator = torch.Generator(device).manual_seed(seed)
        self.ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        """The token sampled last, which the next step takes in."""
        self.position = position.clone()
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.tokens = torch.full((rows, most), padding, dtype=torch.int64, device=device)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)
        """Tokens sampled so far."""

    def take(self, logits: Tensor) -> None:
        """Sample the next token from [B, vocabulary]."""
        token = torch.where(self.ended, self.padding, self.sampler(logits, self.generator))
        if self.ends is not None:
            # torch.isin sorts where there are many, and waits for the device then.
            self.ended |= (token.unsqueeze(1) == self.ends).any(1)
        self.ids.copy_(token.unsqueeze(1))
        self.tokens.index_copy_(1, self.at, token.unsqueeze(1))
        self.at += 1

    def small(self) -> list[Tensor]:
        """All that a step changes here."""
        return [self.ids, self.position, self.ended, self.tokens, self.at]


class Replay:
    """Runs `step`, or a graph of it that is captured again whenever addresses have changed."""

    def __init__(
        self,
        step: Callable[[], None],
        changed: Callable[[], list[Tensor]],
        state: State,
        wanted: bool,
        reset: Callable[[], None] = lambda: None,
    ):
        """
        Args:
            changed: tells the tensors that a step changes beside those of the state, as they are now; they are as
                before after warming up.
            reset: called before each run of a step that is warmed up, captured or run after a capture that failed.
        """
        self._step, self._tell, self._state, self._reset = step, changed, state, reset
        self._changed: list[Tensor] = []
        self.why_not: str | None = None
        if not wanted:
            self.why_not = "graph=False"
        elif not state.ids.is_cuda:
            self.why_not = f"CUDA graphs need a GPU, the model is on {state.ids.device}"
        self._graph: Any = None
        self._addresses: object = None
        self.captures = 0

    def __call__(self, addresses: object) -> None:
        """
        Args:
            addresses: of all that a step touches; a graph is of use while they are what they were.
        """
        if self.why_not is None and (self._graph is None or addresses != self._addresses):
            self._capture()
            self._addresses = addresses
        if self._graph is None:
            self._step()
        else:
            with torch.cuda.device(self._state.ids.device):
                self._graph.replay()

    def _capture(self) -> None:
        self._graph = None
        self._changed = [*self._state.small(), *self._tell()]
        before = [tensor.clone() for tensor in self._changed]
        random = self._state.generator.get_state()
        with torch.cuda.device(self._state.ids.device):
            current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
            stream.wait_stream(current)
            try:
                with torch.cuda.stream(stream):  # compiles kernels and fills workspaces
                    self._reset()
                    self._step()
                current.wait_stream(stream)
                self._restore(before, random)
                graph = torch.cuda.CUDAGraph()
                graph.register_generator_state(self._state.generator)
                with torch.cuda.graph(graph, stream=stream):
                    self._reset()
                    self._step()
                self._graph = graph
                self.captures += 1
            except Exception as error:  # whatever a model does that no graph can hold
                torch.cuda.set_stream(current)  # a capture that fails leaves its own behind
                torch.cuda.synchronize()
                # So does a generator that was registered with it.
                self._state.generator = torch.Generator(self._state.ids.device)
                self._restore(before, random)
                self._reset()  # what was reckoned in the capture was never computed
                cause = error.__context__ or error
                self.why_not = f"the step cannot be captured: {(str(cause) or repr(cause)).splitlines()[0]}"

    def _restore(self, before: list[Tensor], random: Tensor) -> None:
        for tensor, was in zip(self._changed, before, strict=True):
            tensor.copy_(was)
        self._state.generator.set_state(random)
