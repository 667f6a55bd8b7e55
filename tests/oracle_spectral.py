"""`spectral` as formulas, one head of one row at a time, in float64.

Read from the store: which tokens are in which cluster, and the codes. Those are held against their definitions in
test_spectral_codes.py. All else, what the codes stand for, what is refined, chosen and left to the tail, is
computed here from the row's own keys and values, and from the artifact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from oracle_clusters import Clustering, clustering_of
from oracle_heads import Head, amount, heads_at
from oracles import highest, rankings
from sequences import Row, Step, append, assert_steps
from torch import Tensor

from kvcal.artifacts import Artifact
from kvcal.runtime.attention import Logits
from kvcal.runtime.stores.spectral import Spectral, SpectralStore

LEVELS = {2: [-1.5, -0.5, 0.5, 1.5], 4: [*range(-7, 8)], 8: [*range(-127, 128)]}
CLIP = {2: 0.8, 4: 1.0, 8: 1.0}


@dataclass(frozen=True)
class Coding:
    """Of one KV head."""

    query_map: Tensor
    """[r, D]"""
    key_map: Tensor
    """[r, D], of which each row has keys of variance 1."""
    mean: Tensor
    """[D]"""
    lift: float
    """σ²: the variance of q·k − (A q)·(B (k − μ))."""

    @classmethod
    def of(cls, artifact: Artifact, head: int, rank: int, settings: Spectral, dtype: torch.dtype) -> Coding:
        """Args: dtype: what the maps are rounded to."""

        def tensor(stage: str, name: str) -> Tensor:
            return artifact.stages[stage].tensors[f"layers.0.{name}"][head].double()

        if settings.basis == "pca":
            to_query = to_key = tensor("pca", f"key_{settings.stage}.components")[:rank]
        else:
            to_query, to_key = (tensor("score", f"{settings.stage}.{side}_map")[:rank] for side in ("query", "key"))
        key_mean, covariance = tensor("moments", "key_post.mean"), tensor("moments", "key_post.covariance")
        query_mean = tensor("moments", "query_post.mean")
        second_moment = tensor("moments", "query_post.covariance") + torch.outer(query_mean, query_mean)
        left_out = torch.eye(len(key_mean), dtype=torch.float64) - sum(
            torch.outer(a, b) for a, b in zip(to_query, to_key, strict=True)
        )
        lift = torch.trace(left_out.T @ second_moment @ left_out @ covariance)
        spread = torch.stack([(row @ covariance @ row).sqrt() for row in to_key])[:, None]
        parts = (to_query * spread, to_key / spread, key_mean)
        return cls(*(part.float().to(dtype).double() for part in parts), float(lift))

    def logits(self, head: Head, stored: Tensor, far: Tensor | float = 0.0) -> Tensor:
        """Args: stored: [n, r], what the codes stand for; far: [n], beyond them along the query."""
        mapped = self.query_map @ head.query
        dots = stored @ mapped + self.mean @ head.query + mapped.norm() * far
        return head.logit(dots) + self.lift * head.logits.scaling**2 / 2


def dequantised(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """[n, …] and [n, 1] -> [n, r]: byte j has the dimensions j, r/4 + j, … of 2 bits, j and r/2 + j of 4."""
    if bits == 8:
        return codes.double() * scales.double()
    fields = 8 // bits
    entries, width = codes.shape
    out = torch.empty(entries, width * fields, dtype=torch.float64)
    for entry in range(entries):
        for at, byte in enumerate(codes[entry].tolist()):
            for field in range(fields):
                code = byte >> bits * field & 2**bits - 1
                out[entry, field * width + at] = code - 1.5 if bits == 2 else code - 8
    return out * scales.double()


@dataclass(frozen=True)
class Held:
    """What a store has of one row and KV head."""

    found: Clustering
    tokens: Tensor
    """[n, r], by position, what their codes stand for."""
    clusters: Tensor
    """[C, r], of the mean keys."""
    values: Tensor
    """[C, Dv], mean values."""

    @classmethod
    def of(cls, store: SpectralStore, row: int, head: int) -> Held:
        found, length = clustering_of(store, row, head), store.lengths[row]
        count = len(found.members)
        at = store.rows["position"].view[row, head, :length, 0].long()

        def read(name: str, scale: str, bits: int, rows: slice) -> Tensor:
            if rows.stop == 0:
                return torch.empty(0, 0).double()
            return dequantised(*(store.rows[each].view[row, head, rows] for each in (name, scale)), bits)

        by_slot = read("code", "scale", store.selection.bits, slice(length))
        clusters = read("cluster.key", "cluster.key_scale", 4, slice(count))
        values = read("cluster.value", "cluster.value_scale", 8, slice(count))
        return cls(found, by_slot[at.argsort()], clusters, values)


def budgets(settings: Spectral, tokens: int, held: Held) -> tuple[int, list[int], list[int], list[int], int, int]:
    """(sinks, the open window, its recent tokens, its others, tokens left to choose, clustered ones to refine)."""
    sinks = min(settings.sinks, tokens)
    budget = tokens if tokens < settings.dense_below else amount(settings.keep, tokens)
    window = held.found.open.tolist()[sinks:]
    recent = max(1, min(settings.recent, budget // 2 - settings.sinks))
    last, waiting = window[-recent:], window[:-recent]
    whole = budget == tokens or not held.found.members
    left = tokens if whole else max(0, budget - sinks - len(last))
    clustered = sum(map(len, held.found.members))
    refined = clustered
    if clustered and tokens >= settings.flat_below:
        refined = min(clustered, max(amount(settings.refine, clustered), left))
    return sinks, window, last, waiting, left, refined


def attend(heads: list[Head], settings: Spectral, held: Held, coding: Coding) -> list[tuple[Tensor, Tensor]]:
    """(tokens read, output) of each head of a group."""
    sinks, window, last, waiting, left, room = budgets(settings, len(heads[0].key), held)
    filled = [which for which, members in enumerate(held.found.members) if len(members)]
    coarse = [coding.logits(head, held.clusters) if filled else torch.empty(0).double() for head in heads]
    # 2.5 standard deviations of a step as long as the one to the farthest member, in a random direction.
    keys = [coding.key_map @ heads[0].key[held.found.members[which]].T for which in filled]
    radii = torch.tensor([float((each - each.mean(1, keepdim=True)).norm(dim=0).max()) for each in keys]).double()
    far = 2.5 * radii.half().double() / math.sqrt(len(coding.key_map))
    reach = [coding.logits(head, held.clusters[filled], far) if filled else torch.empty(0).double() for head in heads]
    candidates = []
    for by in rankings(reach, settings.select):
        order = [filled[which] for which in by.argsort(descending=True).tolist()]
        refined = [token for which in order for token in held.found.members[which].tolist()][:room]
        candidates.append(torch.tensor([*refined, *waiting], dtype=torch.int64))
    fine = [coding.logits(head, held.tokens[each]) for head, each in zip(heads, candidates, strict=True)]
    results = []
    for number, by in enumerate(rankings(fine, settings.select)):
        chosen = candidates[number][highest(by, left)]
        read = torch.cat((torch.tensor([*range(sinks), *last], dtype=torch.int64), chosen))
        head, of_token = heads[number], dict(zip(candidates[number].tolist(), fine[number].tolist(), strict=True))
        logits, values = head.logit(head.key[read] @ head.query).tolist(), list(head.value[read])
        if settings.tail:
            unread = of_token.keys() - set(chosen.tolist())
            groups = [
                (members.tolist(), float(coarse[number][which])) for which, members in enumerate(held.found.members)
            ]
            for which, (members, of_mean) in enumerate([*groups, (window, math.nan)]):
                mass = sum(math.exp(of_token[token]) for token in members if token in unread)
                if which < len(groups):
                    mass += math.exp(of_mean) * sum(token not in of_token for token in members)
                if mass:
                    logits.append(math.log(mass))
                    values.append(held.values[which] if which < len(groups) else head.value[window].mean(0))
        results.append((read, head.softmax(torch.tensor(logits).double()) @ torch.stack(values)))
    return results


def expected(rows: Sequence[Row], logits: Logits, store: SpectralStore, artifact: Artifact) -> list[Step]:
    """What the store's last step should have given each row, `rows` in float64."""
    steps, dtype = [], store.rows["key"].view.dtype
    for index, row in enumerate(rows):
        tokens = store.lengths[index]
        output = torch.empty(row.query.shape[0], row.value.shape[-1], dtype=torch.float64)
        read = torch.zeros(row.query.shape[0], tokens, dtype=torch.bool)
        for kv_head in range(row.key.shape[0]):
            coding = Coding.of(artifact, kv_head, store.basis.rank, store.selection, dtype)
            heads, held = heads_at(row, logits, kv_head, tokens), Held.of(store, index, kv_head)
            for head, (chosen, out) in zip(heads, attend(heads, store.selection, held, coding), strict=True):
                assert len(chosen.unique()) == len(chosen)
                read[head.index, chosen], output[head.index] = True, out
        steps.append(Step(output, read))
    return steps


def decode_checked(store: SpectralStore, rows: Sequence[Row], logits: Logits, artifact: Artifact, steps: range) -> None:
    """Decode; every step of every row equals its formula."""
    double = [row.double() for row in rows]
    for step in steps:
        output = store.attend(append(store, rows, step), logits)
        mask = store.read_mask()
        mask = mask.repeat_interleave(output.shape[1] // mask.shape[1], 1)
        for index, want in enumerate(expected(double, logits, store, artifact)):
            tokens = store.lengths[index]
            assert not mask[index, :, tokens:].any(), "tokens read that the row has not"
            assert_steps([Step(output[index, :, 0], mask[index, :, :tokens])], [want], rows[index].key.dtype)
