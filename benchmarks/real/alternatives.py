"""What `spectral` could do otherwise: other codes, rows, budgets and stand-ins, at the same bytes, on the same keys.

A model of its step in plain torch over all decoded tokens at once, with the exact choice; the first row of the table is
the step itself, which the model of it has to meet. The noise of estimated logits is taken as if it were known: what
does not pay so does not pay where it has to be estimated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from attention import BATCH, errors
from settings import CODEWORDS, PAGE, at_equal_bytes
from torch import Tensor

from kvcal.artifacts import Artifact
from kvcal.calibrate.evaluation.standard_errors import mean
from kvcal.calibrate.planning.points import Problem, relative_error
from kvcal.kernels.codes import decode, encode, rotation
from kvcal.runtime.methods.choosing import shared
from kvcal.runtime.methods.codewords import Codewords, nearest

LEVEL = 1 / 8
"""Of the bytes."""
SINKS, RECENT = 1, 16
Codes = tuple[tuple[float, int], ...]
"""Groups of dimensions, the most important ones first: a share of the head dim, and bits of each dimension."""


@dataclass(frozen=True)
class Variation:
    codes: Codes = ((0.5, 2),)
    rotated: bool = True
    rows: int = 8
    rounded: bool = False
    """Whether rows are turned by a rotation of bfloat16 numbers."""
    rest: str = "codeword and page"
    """What stands for a token that is not read: "nothing"; the calibrated mean value of its "codeword", corrected by
    what that leaves of its page ("codeword and page") or not; the "page"'s mean; the mean of its codeword's tokens in
    this sequence ("mean of the sequence"), corrected likewise ("mean of the sequence and page") or not."""
    by_mass: bool = False
    """Whether a KV head and step reads as many tokens as hold a share of the estimated mass, the same share everywhere
    and such that no more is read in all."""
    noise: float = 0.0
    """Times half of the variance of an estimated logit, added to the logits of what is not read."""

    def tokens(self, head_dim: int, length: int) -> int:
        """Read at each step, of what codes, corrections and tables leave of the bytes."""
        coded = sum(share * head_dim for share, _ in self.codes)
        index = 1 + sum(share * head_dim * bits / 8 + 2 for share, bits in self.codes)
        if "page" in self.rest:
            index += (head_dim + 2) / PAGE
        shared = 2 * (2 * CODEWORDS * head_dim + CODEWORDS + 2 * head_dim * coded)
        own = CODEWORDS * (head_dim + 2) if "sequence" in self.rest else 0  # of 8 bits
        row = 4 * head_dim if self.rows == 16 else 2 * (head_dim * self.rows / 8 + 2)
        return math.ceil((LEVEL * 4 * head_dim - index - (shared / BATCH + own) / length) * length / row)


AS_IT_IS = Variation()
VARIATIONS: dict[str, Variation] = {
    "as it is": AS_IT_IS,
    "not rotated": Variation(rotated=False),
    "4 bits in an eighth of the dimensions, 2 in the next quarter": Variation(codes=((0.125, 4), (0.25, 2))),
    "8 bits in a sixteenth of the dimensions, 2 in the next quarter": Variation(codes=((0.0625, 8), (0.25, 2))),
    "rows of 16 bits": Variation(rows=16),
    "rows of 4 bits": Variation(rows=4),
    "rows turned by a rotation of 16 bits": Variation(rounded=True),
    "tokens by mass": Variation(by_mass=True),
    "nothing for the rest": Variation(rest="nothing"),
    "codewords alone": Variation(rest="codeword"),
    "pages alone": Variation(rest="page"),
    "codewords' means of the sequence": Variation(rest="mean of the sequence"),
    "codewords' means of the sequence, and pages": Variation(rest="mean of the sequence and page"),
    "logits of the rest plus half of their noise": Variation(noise=1.0),
    "logits of the rest less half of their noise": Variation(noise=-1.0),
}


def alternatives(found: Sequence[Problem], artifact: Artifact) -> list[dict[str, Any]]:
    """Of the step itself and of each variation "tokens" read at a step, "error" and "error_se" over texts, and "gain"
    and "gain_se": by how much it errs less than the model of the step as it is."""
    head_dim, length = found[0].key.shape[3], found[0].prefix
    setting = {**at_equal_bytes(LEVEL, head_dim, length)[-1], "choice": "exact"}
    (itself,) = errors(found, [setting], artifact)
    rows: list[dict[str, Any]] = [{"what": "the step itself", "error": itself["error"], "error_se": itself["error_se"]}]
    as_it_is: list[float] = []
    for name, variation in VARIATIONS.items():
        by_text = _by_text(found, artifact, variation)
        as_it_is = as_it_is or by_text
        error, error_se = mean(by_text)
        gain, gain_se = mean([one - other for one, other in zip(as_it_is, by_text, strict=True)])
        tokens = variation.tokens(head_dim, length)
        rows.append({"what": name, "tokens": tokens, "error": error, "error_se": error_se})
        if variation is not AS_IT_IS:
            rows[-1] |= {"gain": gain, "gain_se": gain_se}
    return rows


@torch.no_grad()
def _by_text(found: Sequence[Problem], artifact: Artifact, variation: Variation) -> list[float]:
    """[B] errors, means of layers, heads and steps."""
    share = _share_of_mass([_Layer(problem, artifact, variation) for problem in found]) if variation.by_mass else None
    layers = (_Layer(problem, artifact, variation) for problem in found)
    return torch.stack([layer.errors(share) for layer in layers]).mean(0).tolist()


def _share_of_mass(layers: Sequence[_Layer]) -> float:
    """With which as much is read as uniformly, by bisection."""
    masses = [layer.masses for layer in layers]
    wanted, low, high = float(layers[0].count), 0.0, 1.0
    for _ in range(30):
        share = (low + high) / 2
        read = torch.stack([(of.cumsum(-1) - of < share).sum(-1).float().mean() for of in masses]).mean()
        low, high = (share, high) if read < wanted else (low, share)
    return low


class _Layer:
    """One layer, all decoded tokens at once: [B, Hkv, G, steps, T]."""

    def __init__(self, problem: Problem, artifact: Artifact, variation: Variation):
        self.variation, self.logits = variation, problem.logits
        self.key, self.value = problem.key.float(), problem.value.float()
        heads, total, dims = self.key.shape[1:]
        steps = problem.query.shape[2]
        self.query = problem.query.float().unflatten(1, (heads, -1))
        self.of = Codewords(artifact, problem.layer, dims).on(torch.device("cpu"))
        self.words = nearest(self.of, self.key, self.value)
        self.count = variation.tokens(dims, problem.prefix)
        self.maps = [
            artifact.tensor("codebook", problem.layer, f"code.{name}_map").float().mT for name in ("query", "key")
        ]
        position, last = torch.arange(total), torch.arange(total - steps, total).unsqueeze(1)
        self.held = position <= last
        self.always = self.held & ((position < SINKS) | (position > last - RECENT))
        self.full = (position // PAGE + 1) * PAGE - 1 <= last
        """[steps, T]: whether a token's page is full."""

    def errors(self, share: float | None) -> Tensor:
        """[B]. Args: share: of the mass that is read, where it is not a number of tokens."""
        chosen, rest = self._chosen(share), self.estimated
        true = self._logits(self.query @ self.key.unsqueeze(2).mT)
        dense = true.softmax(-1) @ self.value.unsqueeze(2)
        if self.variation.noise:
            off = (true - rest).where(self.held, 0.0).square().sum(-1, keepdim=True)
            rest = rest + self.variation.noise / 2 * off / self.held.sum(-1, keepdim=True)
        if self.variation.rest == "nothing":
            rest = torch.full_like(rest, -torch.inf)
        key, value = self._rows()
        exact = self._logits(self.query @ key.unsqueeze(2).mT)
        weights = torch.where(chosen, exact, rest).softmax(-1)
        out = (weights * chosen) @ value.unsqueeze(2) + self._stand_ins(weights * ~chosen)
        return relative_error(out, dense).mean((1, 2, 3))

    @cached_property
    def estimated(self) -> Tensor:
        left = self.key - self._codeword("key")
        dots = self.query @ self._codeword("key").unsqueeze(2).mT
        at = 0
        for share, bits in self.variation.codes:
            dims = round(share * self.key.shape[-1])
            query_map, key_map = (of[..., at : at + dims] for of in self.maps)
            if self.variation.rotated:
                turn = rotation(dims).float().mT
                query_map, key_map = query_map @ turn, key_map @ turn
            coded = decode(*encode(left @ key_map, bits), bits)
            dots = dots + (self.query @ query_map.unsqueeze(1)) @ coded.unsqueeze(2).mT
            at += dims
        return self._logits(dots)

    def _logits(self, dots: Tensor) -> Tensor:
        return self.logits.of(dots).masked_fill(~self.held, -torch.inf)

    def _codeword(self, name: str) -> Tensor:
        """[B, Hkv, T, D]"""
        found: Tensor = self.of[name][self.of["head"], self.words]
        return found

    def _rows(self) -> tuple[Tensor, Tensor]:
        if self.variation.rows == 16:
            return self.key, self.value
        bits, kept = self.variation.rows, []
        for name, row in (("key", self.key), ("value", self.value)):
            turn = rotation(row.shape[-1]).float()
            if self.variation.rounded:
                turn = turn.bfloat16().float()
            code = encode((row - self._codeword(name)) @ turn.mT, bits)
            kept.append(decode(*code, bits) @ turn + self._codeword(name))
        return kept[0], kept[1]

    @cached_property
    def order(self) -> Tensor:
        """[B, Hkv, 1, steps, T]: tokens in the order in which they are read, those first that always are."""
        scores = self._shared().masked_fill(self.always, torch.inf)
        return scores.argsort(-1, descending=True)

    @property
    def masses(self) -> Tensor:
        """[B, Hkv, 1, steps, T]: shares of the estimated mass in that order."""
        return self._shared().softmax(-1).gather(-1, self.order)

    def _shared(self) -> Tensor:
        return shared(self.estimated, "group")

    def _chosen(self, share: float | None) -> Tensor:
        if share is None:
            turn = torch.arange(self.order.shape[-1]) < self.count
            return torch.zeros_like(self.order, dtype=torch.bool).scatter(-1, self.order, turn.expand_as(self.order))
        before = self.masses.cumsum(-1) - self.masses
        by_mass = torch.zeros_like(self.order, dtype=torch.bool).scatter(-1, self.order, before < share)
        return by_mass | self.always

    def _stand_ins(self, weights: Tensor) -> Tensor:
        """[B, Hkv, G, steps, Dv] of the weights of what is not read."""
        kind = self.variation.rest
        base = self._means() if "sequence" in kind else self._codeword("value")
        out = weights @ base.unsqueeze(2)
        if "page" not in kind:
            return out
        whole = self.value.shape[2] // PAGE * PAGE
        value, base = (of[:, :, :whole].unflatten(2, (-1, PAGE)) for of in (self.value, base))
        mean_of = value.mean(3, keepdim=True)
        correction = mean_of - (base if kind == "page" else base.mean(3, keepdim=True))
        return out + (weights * self.full)[..., :whole] @ correction.expand_as(value).flatten(2, 3).unsqueeze(2)

    def _means(self) -> Tensor:
        """[B, Hkv, T, Dv]: of the values of each token's codeword in this sequence."""
        index = self.words.unsqueeze(-1).expand_as(self.value)
        sums = torch.zeros(*self.value.shape[:2], self.of["value"].shape[1], self.value.shape[-1])
        means = sums.scatter_reduce(2, index, self.value, "mean", include_self=False)
        return means.gather(2, index)
