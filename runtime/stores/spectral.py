"""`spectral`: low-bit codes in a calibrated basis choose, exact rows answer, clusters stand for the rest.

A step reads

1. of every cluster a code of its mean key, and how far its members lie from it; by what the best of them may reach,
   clusters are refined, `refine` tokens in all;
2. of their tokens, and of those in the open window, the codes; by them the best `keep` tokens are read exactly, the
   sinks and the most recent tokens among them;
3. of every cluster its mean value. It stands for what was not read: of refined tokens with the sum of the
   exponentials of their codes' logits, of others with their number and the logit of the cluster's mean key.

    out = (Σ_read e^{q·k} v + Σ_c m_c v̄_c) / (Σ_read e^{q·k} + Σ_c m_c)
    m_c = Σ_{refined in c, not read} e^{ŝ} + n_c e^{ŝ_c}                      n_c: tokens of c that were not refined

Rows shorter than `flat_below` have all codes read, and those of no cluster. Tokens lie sorted by cluster, so what is
refined is read in runs. New tokens have their code at once and their cluster when their window closes; until then the
open window is one more cluster, whose mean value is kept up to date. A row without clusters is read whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...artifacts import Artifact, KvcalError
from ...kernels.score import quantize
from ..attention import Logits
from ..kv.buffers import Places, find_places
from .amounts import Amount, check_amount, check_count, count_of
from .clusters import Clusters, slot_index, take
from .codes import CodedBasis
from .saved import FLOATS, Saved
from .saved_clusters import SavedClusters
from .saved_codes import check_coded_means, check_codes
from .selecting import Chosen, best
from .sorted_by_cluster import Sorted, SortedStore, calibrated_centroids
from .tail import Remainder, Tail

MEAN_KEY_BITS, MEAN_VALUE_BITS = 4, 8
"""Of clusters: on the demo model fewer cost accuracy, and more gain none."""
OPEN = "open.value"
"""Sum of the values in each row's open window."""


@dataclass(frozen=True)
class Spectral(Sorted):
    keep: Amount = 0.0625
    """Tokens read exactly per step, sinks and recent ones included: a fraction of the row's tokens, or a count."""
    select: str = "group"
    tail: bool = True
    tokens_per_cluster: int = 32
    window: int = 64
    """Decoded tokens that are clustered together; until then their codes are read at every step."""
    rank: Amount | str = 0.5
    """Dimensions of a code: a fraction of the head dim, a count, or "variance:0.9"; a multiple of 16."""
    bits: int = 2
    """Of each dimension: 2, 4 or 8."""
    clip: float | None = None
    """The largest level as a share of a token's largest magnitude; None: what suits the bits."""
    refine: Amount = 0.25
    """Clustered tokens whose codes are read: 1.0 for all, and none of the clusters'."""
    flat_below: int = 8192
    """Rows of fewer tokens have all codes read, and no cluster's."""
    recent: int = 16
    """Of the open window's tokens the last, always read exactly; with the sinks, half of `keep` at most."""
    stage: str = "post"
    basis: str = "score"

    def check(self) -> None:
        super().check()
        check_amount("refine", self.refine)
        check_count("flat_below", self.flat_below)
        check_count("recent", self.recent, 1)

    def window_of(self, length: int) -> int:
        return self.window

    def recent_of(self, length: int) -> int:
        """Tokens of a row of `length` that are read for being recent."""
        return max(1, min(self.recent, self.of(length) // 2 - self.sinks))

    def build(self, layer: int, head_dim: int, artifact: Artifact | None) -> Callable[[], SpectralStore]:
        self.check()
        if artifact is None:
            raise KvcalError("spectral needs an artifact: make one with `calibrate pca` and pass it")
        basis = CodedBasis.load(artifact, layer, self.rank, self.bits, self.clip, self.stage, self.basis)
        start = calibrated_centroids(artifact, layer)
        return lambda: SpectralStore(self, basis, start)


@dataclass(frozen=True)
class Candidates:
    """The tokens whose codes were read."""

    slots: Tensor
    """[B, Hkv, G or 1, M] int64; those that do not count repeat some slot."""
    counted: Tensor
    """The same shape, bool."""
    logits: Tensor
    """[B, Hkv, G, M] float32, -inf where not counted."""
    of_clusters: Tensor | None
    """[B, Hkv, G, C] float32, of the clusters' mean keys; None: every token is a candidate."""


class SpectralStore(SortedStore):
    selection: Spectral
    beside = ("position", "code", "scale")
    _candidates: Candidates
    """Of the step that is under way."""
    _taken: tuple[Tensor, Tensor]
    """Which of them are read: indices [B, Hkv, G or 1, k], and which count."""

    def __init__(self, settings: Spectral, basis: CodedBasis, start: Tensor | None):
        self.basis = basis
        super().__init__(settings, start)

    def _make_tail(self) -> Tail | None:
        return None  # it is weighed by the codes, not by the mean keys

    def _encode_mean(self, name: str, means: Tensor) -> dict[str, Tensor]:
        if name == "cluster.key":
            codes, scales = self.basis.encode(means, MEAN_KEY_BITS)
        else:
            codes, of_value = quantize(means, MEAN_VALUE_BITS)
            assert of_value is not None
            scales = of_value.unsqueeze(-1)
        return {name: codes, f"{name}_scale": scales}

    # Tokens come and go

    def append(self, key: Tensor, value: Tensor, valid: Tensor | None = None) -> None:
        super().append(key, value, valid)
        if OPEN not in self.totals:
            self.totals[OPEN] = self.sum_of_open()
            return
        came = [True] * len(self.lengths) if valid is None else valid[:, 0].tolist()
        joins = [at and length > self.selection.sinks for at, length in zip(came, self.lengths, strict=True)]
        mask = torch.tensor(joins, device=value.device).view(-1, 1, 1)
        self.totals[OPEN] = self.totals[OPEN] + value[:, :, 0].float().masked_fill(~mask, 0)

    def sum_of_open(self) -> Tensor:
        """[B, Hkv, Dv] float32, of the values in the open windows."""
        slots = [range(begin, length) for begin, length in zip(self._open_begin(), self.lengths, strict=True)]
        index, held = slot_index(slots, self._device)
        return take(self.rows["value"].view, index).float().masked_fill(~held.unsqueeze(-1), 0).sum(2)

    def state(self) -> dict[str, Tensor]:
        """Without the sum of the open window, which the values give anew."""
        return {name: tensor for name, tensor in super().state().items() if name != f"totals.{OPEN}"}

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        if any(self.clusters.counts):
            self.totals[OPEN] = self.sum_of_open()

    def _extended(self, key: Tensor, value: Tensor, places: Places) -> None:
        super()._extended(key, value, places)
        for name, new in zip(("code", "scale"), self.basis.encode(key), strict=True):
            self.rows.setdefault(name, self._buffer(name)).write(new, places)

    def _close(self, clusters: Clusters, slots: list[range]) -> None:
        before = clusters.counts
        super()._close(clusters, slots)
        self.totals.pop(OPEN, None)  # the next token sums up anew
        self._measure_radii(slots, before)

    def _measure_radii(self, slots: list[range], before: list[int]) -> None:
        """Of the clusters that these slots of each row became, of which a row had `before`."""
        index, held = slot_index(slots, self._device)
        keys = take(self.rows["key"].view, index)
        first = torch.tensor(before, device=index.device).view(-1, 1, 1)
        new = [after - count for after, count in zip(self.clusters.counts, before, strict=True)]
        owner = (self._owner(index.expand(*keys.shape[:3]).contiguous()) - first).masked_fill(~held, max(new))
        places = find_places(before, max(new), torch.arange(max(new)) < torch.tensor(new).unsqueeze(1), index.device)
        radii = self.basis.radii(keys, owner, max(new)).half().unsqueeze(-1)
        self.rows.setdefault("cluster.radius", self._buffer("cluster.radius")).write(radii, places)

    def _check(self, saved: Saved) -> None:
        heads, _, dims = self.basis.key_shape
        saved.take("rows.key", FLOATS, None, heads, None, dims)
        super()._check(saved)
        check_codes(saved, self.basis)

    def _check_means(self, saved: Saved, found: SavedClusters, owners: list[Tensor]) -> None:
        check_coded_means(saved, self.basis, found, owners, (MEAN_KEY_BITS, MEAN_VALUE_BITS))

    def _owner(self, slots: Tensor) -> Tensor:
        """The cluster of each slot [B, Hkv, L]; C beyond the clustered ones."""
        ends = (self.clusters.sizes * self.clusters.there(slots.device)).long().cumsum(-1) + self.selection.sinks
        return torch.searchsorted(ends, slots, right=True)

    def _forget(self) -> None:
        super()._forget()
        self.totals.pop(OPEN, None)

    def _left(self) -> list[int]:
        """Tokens of each row that the choice is among; all of a row that is read whole."""
        of = self.selection
        left = []
        for recent, length, count in zip(self._recent_begin(), self.lengths, self.clusters.counts, strict=True):
            budget = of.of(length)
            whole = budget == length or not count  # without clusters as it would be alone
            left.append(length if whole else max(0, budget - min(of.sinks, length) - (length - recent)))
        return left

    def _recent_begin(self) -> list[int]:
        """First slot of each row's recent tokens."""
        pairs = zip(self._open_begin(), self.lengths, strict=True)
        return [max(first, length - self.selection.recent_of(length)) for first, length in pairs]

    def _open_begin(self) -> list[int]:
        """First slot of each row's open window."""
        sinks = self.selection.sinks
        return [max(done, min(sinks, length)) for done, length in zip(self.clusters.upto, self.lengths, strict=True)]

    # A step

    def _score(self, query: Tensor, logits: Logits) -> Tensor:
        recalled, of_clusters = self._refine(query, logits)
        begin = self._open_begin()
        slots = [range(first, end) for first, end in zip(begin, self._recent_begin(), strict=True)]
        index, held = slot_index(slots, query.device)
        shape = (*recalled.index.shape[:3], -1)
        index = torch.cat((recalled.index, index.unsqueeze(1).expand(shape)), -1)
        assert recalled.counted is not None
        counted = torch.cat((recalled.counted, held.unsqueeze(1).expand(shape)), -1)
        codes, scales = (self._at(name, index) for name in ("code", "scale"))
        self._read += codes.nbytes + scales.nbytes + self.shared_bytes()
        own = self.basis.logits(query, codes, scales, logits).masked_fill(~counted, -torch.inf)
        self._candidates = Candidates(index, counted, own, of_clusters)
        return own

    def _refine(self, query: Tensor, logits: Logits) -> tuple[Chosen, Tensor | None]:
        """Clustered tokens whose codes are read, and the clusters' logits where a row has others."""
        of, sizes = self.selection, self.clusters.sizes
        self._read += sizes.nbytes
        there = (self.clusters.there(query.device) & (sizes > 0)).unsqueeze(2)
        clustered = [max(0, done - min(of.sinks, done)) for done in self.clusters.upto]
        room = [
            held if length < of.flat_below else min(held, max(count_of(of.refine, held), left))
            for held, length, left in zip(clustered, self.lengths, self._left(), strict=True)
        ]
        if room == clustered:
            alike = torch.zeros(sizes.shape, device=query.device).unsqueeze(2).masked_fill(~there, -torch.inf)
            return self.recall(alike, room), None
        codes, scales, radii = (self.rows[f"cluster.{name}"].view for name in ("key", "key_scale", "radius"))
        self._read += codes.nbytes + scales.nbytes + radii.nbytes
        scores = self.basis.logits(query, codes, scales, logits, MEAN_KEY_BITS).masked_fill(~there, -torch.inf)
        reach = self.basis.logits(query, codes, scales, logits, MEAN_KEY_BITS, radii.squeeze(-1))
        return self.recall(self._shared(reach.masked_fill(~there, -torch.inf)), room), scores

    def shared_bytes(self) -> int:
        return self.basis.nbytes(self.rows["key"].view)

    def _at(self, name: str, slots: Tensor) -> Tensor:
        """[B, Hkv, G or 1, M, …] of the tokens there."""
        rows = self.rows[name].view
        return take(rows, slots.flatten(2)).unflatten(2, slots.shape[2:])

    def _pick(self, scores: Tensor, budgets: list[int]) -> Chosen:
        found = self._candidates
        left = [min(budget, scores.shape[-1]) for budget in self._left()]
        taken = best(scores, left)
        shape = (*taken.index.shape[:3], -1)
        counted = found.counted.expand(shape).gather(-1, taken.index)
        counted = counted if taken.counted is None else counted & taken.counted
        self._taken = taken.index, counted
        always = [
            [*range(min(self.selection.sinks, length)), *range(recent, length)]
            for recent, length in zip(self._recent_begin(), self.lengths, strict=True)
        ]
        most = max(map(len, always))
        padded = torch.tensor([[*row, *[-1] * (most - len(row))] for row in always], device=scores.device)
        padded = padded[:, None, None].expand(shape)
        slots = found.slots.expand(shape).gather(-1, taken.index)
        return Chosen(torch.cat((padded.clamp_min(0), slots), -1), torch.cat((padded >= 0, counted), -1))

    def _rest(self, query: Tensor, logits: Logits, own: Tensor, chosen: Chosen) -> Remainder | None:
        if not self.selection.tail:
            return None
        values, scales = self.rows["cluster.value"].view, self.rows["cluster.value_scale"].view
        if OPEN not in self.totals:  # tokens were taken back since the last one came
            self.totals[OPEN] = self.sum_of_open()
        opened, sizes = self.totals[OPEN], self.clusters.sizes
        self._read += values.nbytes + scales.nbytes + opened.nbytes
        found, clusters = self._candidates, sizes.shape[-1]
        there = self.clusters.there(query.device)
        owner = self._owner(found.slots.flatten(2)).view_as(found.slots)  # C: the open window
        index, counted = self._taken
        taken = index.expand(*own.shape[:3], -1)
        gone = torch.zeros(taken.shape, device=own.device).masked_fill(counted, -torch.inf)
        unread = own.scatter_add(-1, taken, gone)
        highest = unread.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
        mass = own.new_zeros(*own.shape[:3], clusters + 1)
        mass.scatter_add_(-1, owner.expand_as(own), (unread - highest).exp())
        weights = mass.log() + highest
        if found.of_clusters is not None:
            refined = torch.zeros_like(owner[..., :1]).expand(*owner.shape[:3], clusters + 1).contiguous()
            refined.scatter_add_(-1, owner, found.counted.long())
            left = (sizes * there).unsqueeze(2) - refined[..., :clusters]
            coarse = found.of_clusters + left.float().log()
            weights = torch.cat((torch.logaddexp(weights[..., :clusters], coarse), weights[..., clusters:]), -1)
        opens = torch.tensor(self._open_begin(), device=query.device)
        count = (torch.tensor(self.lengths, device=query.device) - opens).clamp_min(1).view(-1, 1, 1)
        means = torch.cat((values.float() * scales.float(), (opened / count).unsqueeze(2)), 2)
        return Remainder(weights, means, 0)
