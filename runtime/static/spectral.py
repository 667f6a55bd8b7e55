"""`spectral` at fixed addresses: codes choose, exact rows answer, clusters stand for the rest.

Which tokens are candidates is decided on the device by each row's length; the host decides only, where it reserves
capacity, whether any row can be long enough for clusters to be refined. Launches: kernels/remainder/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.append import append
from ...kernels.attend import Partial, attend
from ...kernels.dense import dense
from ...kernels.remainder import chosen_slots, remainder
from ...kernels.score import score_runs
from ...kernels.select import select, select_runs
from ..attention import Logits
from ..stores.codes import REACH
from ..stores.spectral import MEAN_KEY_BITS, OPEN, SpectralStore
from .clock import Clock
from .clustered import ALIGNED, ClusteredStep
from .spectral_counts import Counts, counts, is_flat, most_candidates, most_read
from .step import kernel_logits


@dataclass(frozen=True)
class Candidates:
    """Tokens that have been scored: as `score_runs` counts them."""

    begin: Tensor
    """[B] int32 where the range after the runs begins."""
    starts: Tensor | None
    ends: Tensor | None
    """None: there is only the range."""
    own: Tensor | None
    """[B, Hkv, G, M], by query head; None: nobody needs it."""
    shared: Tensor
    """[B, Hkv, M], or [B, Hkv, G, M] by query head: by what is chosen."""
    left: Tensor | None
    """As `ends`, float32: tokens of each cluster that are no candidates."""
    of_clusters: Tensor | None
    """[B, Hkv, G, C] scores of the mean keys."""


class SpectralStep(ClusteredStep):
    store: SpectralStore
    _arrivals: Tensor | None = None
    """The workspace of `select`, which leaves it zero: made before a graph is captured, by the step that warms up."""

    _correction: Tensor | None = None
    """[Hkv] float32, of a layer's logits; likewise."""

    def __init__(self, store: SpectralStore, clock: Clock):
        super().__init__(store, clock)
        value = store.rows["value"].view
        self._open_sum = value.new_zeros(*value.shape[:2], value.shape[3], dtype=torch.float32)
        self._flat, self._room = True, 0

    def reserve(self, capacity: int) -> None:
        super().reserve(capacity)
        store = self.store
        self._open_sum.copy_(store.sum_of_open())
        store.totals[OPEN] = self._open_sum
        self._flat = is_flat(store.selection, capacity)
        # Room for too many candidates is right as well: a graph that was captured with it goes on.
        self._room = -(-most_candidates(store.selection, capacity, min(store.lengths) + 1) // ALIGNED) * ALIGNED

    def write(self, key: Tensor, value: Tensor) -> None:
        store = self.store
        _, key_map, _, _ = store.basis.parts(key)
        append(
            key,
            value,
            key_map,
            self.buffer("key"),
            self.buffer("value"),
            self.buffer("code"),
            self.buffer("scale").squeeze(-1),
            self.clock.held,
            bits=store.basis.bits,
            clip=store.basis.clip,
            offset=store.basis.offset(key),
            value_sum=self._open_sum,
            summed_from=store.selection.sinks,
        )

    def attend(self, query: Tensor, logits: Logits) -> Tensor:
        key, value = self.buffer("key"), self.buffer("value")
        if not self.clustered:
            return dense(query, key, value, self.clock.seen, **kernel_logits(logits))
        projected = self.project(query)
        found = self.candidates(projected, logits)
        chosen = self.choose(found)
        slots = self.slots(found, chosen)
        extra = [self.rest(projected, found, logits)] if self.store.selection.tail else []
        return attend(query, key, value, *slots, extra=extra, **kernel_logits(logits))

    def counts(self) -> Counts:
        of = self.store.selection
        return self.clock.once(("spectral", self.place()), lambda: counts(of, self.clock, self.open(), self._counts))

    def candidates(self, projected: Tensor, logits: Logits) -> Candidates:
        """Score what the choice is among. Args: projected: [B, Hkv, G, r + 1] float32, of `project`."""
        of = self.counts()
        if self._flat:
            return Candidates(of.sinks, None, None, *self.score_tokens(projected, logits), None, None)
        of_clusters, by = self.score_clusters(projected, logits)
        ends, left = self.refine(by)
        own, shared = self.score_tokens(projected, logits, ends)
        return Candidates(of.window, self._kept["start"], ends, own, shared, left, of_clusters)

    def project(self, query: Tensor) -> Tensor:
        """[B, Hkv, G, r + 1] float32: the queries' side of the codes, then their product with the mean key."""
        batch, heads, group, dims = query.shape
        # Converted and laid out for one product per head at once: no copy of the map for each row.
        by_head = query.new_empty(heads, batch, group, dims, dtype=torch.float32).copy_(query.transpose(0, 1))
        products = by_head.flatten(1, 2) @ self.store.basis.query_side(query)
        return products.unflatten(1, (batch, group)).transpose(0, 1)

    def score_clusters(self, projected: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
        """(logits of the mean keys [B, Hkv, G, C], what each cluster's best member may reach [B, Hkv(, G), C])."""
        basis, part = self.store.basis, projected[..., : self.store.basis.rank]
        codes, bias = self.buffer("cluster.key"), projected[..., basis.rank]
        dots, _ = score_runs(
            part,
            codes,
            self.buffer("cluster.key_scale").squeeze(-1),
            self.counts().none,
            self._counts,
            capacity=codes.shape[2],
            scaling=logits.scaling,
            bits=MEAN_KEY_BITS,
            bias=bias if logits.softcap is None else None,
            combine="none",
            out_dtype=torch.float32,
        )
        assert dots is not None
        dots = dots.masked_fill_(self._kept["empty"].unsqueeze(2), -torch.inf)
        means, reach = dots, dots + logits.scaling * part.norm(dim=-1, keepdim=True) * self._kept["reach"].unsqueeze(2)
        if logits.softcap is not None:  # of the whole logit
            cap, shift = Logits(1.0, logits.softcap), logits.scaling * bias.unsqueeze(-1)
            means, reach = (cap.of(each + shift).where(~dots.isneginf(), -torch.inf) for each in (means, reach))
        return means.clamp_max(torch.finfo(self._scores).max).to(self._scores), self._shared(reach)

    @property
    def _scores(self) -> torch.dtype:
        """As Loki's: 16-bit models' logits carry fewer digits than float16 does."""
        return torch.float32 if self.buffer("key").dtype == torch.float32 else torch.float16

    def _shared(self, own: Tensor) -> Tensor:
        """[B, Hkv, G, n] -> [B, Hkv(, G), n]: by what a choice is made."""
        select = self.store.selection.select
        if select == "group":
            return own.float().log_softmax(-1).logsumexp(2)
        return own.amax(2) if select == "max" else own

    def refine(self, by: Tensor) -> tuple[Tensor, Tensor]:
        """(ends, left) of `Candidates`. Args: by: scores of the clusters, [B, Hkv(, G), C]."""
        left = torch.empty(by.shape, dtype=torch.float32, device=by.device)
        ends = torch.empty(by.shape, dtype=torch.int32, device=by.device)
        runs = self._kept["start"], self._kept["size"], self.counts().room, self._counts
        select_runs(by.flatten(1, -2), *runs, unread=left.flatten(1, -2), ends=ends.flatten(1, -2))
        return ends, left

    def score_tokens(
        self, projected: Tensor, logits: Logits, ends: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """(scores by query head, None where there is no tail, scores by what is chosen).

        Args: ends: of the clusters; None: of a row all tokens but sinks and recent ones.
        """
        of, (select, basis) = self.counts(), (self.store.selection.select, self.store.basis)
        scores, best = score_runs(
            projected[..., : basis.rank],
            self.buffer("code"),
            self.buffer("scale").squeeze(-1),
            of.sinks if ends is None else of.window,
            of.recent,
            capacity=self._room,
            scaling=logits.scaling,
            softcap=logits.softcap,
            bits=basis.bits,
            starts=None if ends is None else self._kept["start"],
            ends=ends,
            bias=projected[..., basis.rank],
            combine="none" if select != "max" else "both" if self.store.selection.tail else "max",
            out_dtype=self._scores,
        )
        if best is not None:
            return scores, best
        assert scores is not None
        return scores, self._shared(scores)

    def choose(self, found: Candidates) -> tuple[Tensor, Tensor]:
        """(index [B, Hkv(, G), K] int32 of the best candidates, count [B, Hkv(, G)])"""
        of, scores = self.counts(), found.shared.flatten(1, -2)
        pairs = scores.shape[0] * scores.shape[1]
        if self._arrivals is None or len(self._arrivals) != pairs:
            self._arrivals = self.clock.held.new_zeros(pairs)
        kept = min(most_read(self.store.selection, self.capacity), scores.shape[-1])
        index, count = select(scores, of.left, of.candidates, capacity_out=kept, arrivals=self._arrivals)
        return index.unflatten(1, found.shared.shape[1:-1]), count.unflatten(1, found.shared.shape[1:-1])

    def slots(self, found: Candidates, chosen: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(slots [B, Hkv(, G), K'] int32 of all that is read, count); scores by query head lose it."""
        of, selection = self.counts(), self.store.selection
        return chosen_slots(
            *chosen,
            found.begin,
            of.sinks,
            of.recent,
            self.clock.seen,
            most_always=selection.sinks + selection.recent,
            starts=found.starts,
            ends=found.ends,
            scores=found.own if selection.tail else None,
        )

    def rest(self, projected: Tensor, found: Candidates, logits: Logits) -> Partial:
        """What is not read, through its clusters."""
        of, rank = self.counts(), self.store.basis.rank
        assert found.own is not None
        if self._correction is None:
            self._correction = self.store.basis.correction(projected, logits.scaling)
        return remainder(
            found.own,
            self._kept["end"] if found.ends is None else found.ends,
            of.candidates,
            self.buffer("cluster.value"),
            self.buffer("cluster.value_scale").squeeze(-1),
            self._open_sum,
            of.opened,
            left=found.left,
            cluster_scores=found.of_clusters,
            bias=projected[..., rank] if logits.softcap is None else None,
            correction=self._correction,
            scaling=logits.scaling,
        )

    def _derive(self, size: Tensor) -> None:
        self.keep("size", size)
        self.keep("empty", size == 0)
        radius = self.buffer("cluster.radius").squeeze(-1).float()
        self.keep("reach", REACH * self.store.basis.rank**-0.5 * radius)
        self.keep("end", size.cumsum(-1, dtype=torch.int32))
        self.keep("start", (size.cumsum(-1) - size + self.store.selection.sinks).to(torch.int32))

    def sums(self) -> list[Tensor]:
        return [self._open_sum]

    def addresses(self) -> tuple[tuple[int, int], ...]:
        return (*super().addresses(), (self._open_sum.data_ptr(), self._room), (0, int(self._flat)))

    @property
    def per_token(self) -> tuple[str, ...]:
        return ("key", "value", "position", "code", "scale")
