"""Prompts, steps, pauses, crops, selections and restarts in random order: each row is as if it had been alone."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from methods import EVICTING, FORMS
from sequences import TOLERANCES, Geometry, make
from torch import Tensor

from kvcal.runtime.attention import SoftmaxSpec
from kvcal.runtime.methods import METHODS
from kvcal.runtime.store import Store

GEOMETRY, SPEC = Geometry(8, 4, 2, 2), SoftmaxSpec(0.35)

Position = tuple[bool, bool, list[Tensor]]
"""(not padding, came by prefill, [query, key, value] [1, H, 1, D]) of one row."""


class Rows:
    """A store, and what each of its rows has been given and not lost."""

    def __init__(self, name: str, seed: int):
        self.random = random.Random(f"{name} {seed}")
        self.generator = torch.Generator().manual_seed(self.random.randrange(2**31))
        method, settings = FORMS[name]
        varied = {
            "window": [1, 2, 3, 5],
            "sinks": [0, 1, 4],
            "tokens_per_cluster": [1, 3, 5],
            "recent": [1, 3],
            "segment": [3, 9, 99],
        }
        known = {field.name for field in dataclasses.fields(METHODS[method])}
        chosen = {key: self.random.choice(of) for key, of in varied.items() if key in known}
        self.method, self.settings = method, {**settings, **chosen}
        self.changes = ["prompt", "select", "restart", *([] if name in EVICTING else ["crop"])]
        self.store, self.past = self.empty(), [list[Position]() for _ in range(self.random.randint(1, 3))]

    def empty(self) -> Store:
        return make(self.method, GEOMETRY, **self.settings)

    def feed(self, tokens: int, prompt: bool, padding: float) -> tuple[Tensor | None, Tensor]:
        shapes = ((GEOMETRY.heads, 8), (GEOMETRY.kv_heads, 8), (GEOMETRY.kv_heads, 4))
        new = [torch.randn(len(self.past), heads, tokens, dim, generator=self.generator) for heads, dim in shapes]
        valid = torch.rand(len(self.past), tokens, generator=self.generator) >= padding
        for row, past in enumerate(self.past):
            past += [
                (bool(valid[row, at]), prompt, [tensor[row : row + 1, :, at : at + 1] for tensor in new])
                for at in range(tokens)
            ]
        if prompt:
            self.store.prefill(*new, SPEC, valid)
            return None, valid
        self.store.append(new[1], new[2], valid)
        return self.store.attend(new[0], SPEC, valid), valid

    def change(self) -> None:
        kind = self.random.choice(self.changes)
        if kind == "prompt":
            self.feed(self.random.randint(1, 9), True, 0.2)
        elif kind == "crop":
            count = self.random.randint(1, min(8, len(self.past[0]) - 1))
            self.store.crop(count)
            self.past = [past[:-count] for past in self.past]
        elif kind == "select":
            chosen = [self.random.randrange(len(self.past)) for _ in range(self.random.randint(1, 3))]
            self.store.reorder(torch.tensor(chosen))
            self.past = [list(self.past[row]) for row in chosen]
        else:
            state = {name: tensor.clone() for name, tensor in self.store.state().items()}
            self.store = self.empty()
            self.store.restore(state)

    def alone(self, row: int) -> Tensor:
        """[1, Hq, 1, Dv] the last step of a store that had this row only, prompts whole and without padding."""
        store, output, waiting = self.empty(), torch.empty(0), list[list[Tensor]]()
        for _, prompt, token in (position for position in self.past[row] if position[0]):
            if prompt:
                waiting.append(token)
                continue
            if waiting:
                store.prefill(*(torch.cat(of, 2) for of in zip(*waiting, strict=True)), SPEC)
                waiting = []
            store.append(token[1], token[2])
            output = store.attend(token[0], SPEC)
        return output


CASES = [(name, seed) for name in FORMS if name != "full" for seed in range(6)]


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_any_order(name: str, seed: int) -> None:
    rows = Rows(name, seed)
    rows.feed(rows.random.randint(12, 30), True, 0.3)
    for _ in range(6):
        for _ in range(rows.random.randint(1, 4)):
            output, valid = rows.feed(1, False, 0.15)
            assert output is not None
            for row in valid[:, 0].nonzero().flatten().tolist():
                torch.testing.assert_close(output[row], rows.alone(row)[0], **TOLERANCES[torch.float32])
        rows.change()
        if not all(any(real for real, _, _ in past) for past in rows.past):
            rows.feed(1, True, 0.0)  # the first token of a row comes by prefill
