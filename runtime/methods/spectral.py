"""`spectral`: low-bit codes select tokens, selected tokens are read exactly, codewords stand for the others.

Every token (k, v) belongs to a codeword (k′, v′) of a codebook that was calibrated offline (`calibrate/codebook.py`).
Kept beside its key and value are the codeword's number and a code of k − k′ in the basis that is best for q·(k − k′),
rotated so that its dimensions vary alike and each can have the same few bits (`kernels/codes`). A step

1. estimates q·k of every token from codeword and code, ŝ = q·k′ + (q A)·(s c), where A maps queries to the code's
   basis, c are the numbers that the code stands for, and s is its scale,
2. selects the first tokens, the most recent ones and the best by ŝ, and reads them exactly,
3. lets the codeword's value stand for each unselected token, and corrects it by page:

    out = (Σ_read e^{q·k} v + Σ_other e^{ŝ} (v′ + d)) / (Σ_read e^{q·k} + Σ_other e^{ŝ})

with d the mean of v − v′ over the token's page, 0 until the page is full. (q·k and ŝ are scaled and soft-capped as in
the model; its sink logits join the denominator.) Weights of unselected tokens are added up by codeword and by page, so
that the sum over these tokens takes two small matrix products.

With `rows=8` keys and values are kept as codeword and rotated 8-bit code of the difference: half the memory and bytes.
With `rows="xcla"` they are kept as `xcla` keeps them (`spectral_rows.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...artifacts import Artifact, KvcalError
from ...kernels.append import kernel_for, run_coded
from ...kernels.codes import BITS, correction_of, decode, encode_tokens, fields_of, products
from ...kernels.scan import Tables, Tokens
from ..attention import SoftmaxSpec
from ..cla.group_code import GroupCode, earlier_layers
from ..kv.pages import PAGE, LayerCache
from .amounts import Amount, check_choice, check_count, check_flag
from .base import Attended, Method, Policy, Reading, Selected, Widths
from .basis import rank_of
from .choosing import Counts, Sampling, choose
from .codewords import Codewords
from .full import attend_all
from .scanning import Scan

ByName = Mapping[str, Tensor]
"""The tables of a layer by name, see `Codewords.on`."""
ROWS, XCLA = (16, 8, "xcla"), "xcla"
STEP = 16
"""Ranks are multiples of it where the head dim is: the least that a tensor core multiplies."""
PLANNING_CODES = ((0.25, 2), (0.5, 2), (1.0, 2), (0.5, 4))
"""Of `planning_grid`: share of the head dim, and bits of each dimension."""
PLANNING_RICHEST = (1.0, 2, 1 / 2)
"""One more setting, for large budgets: share of the head dim, bits, and `keep`."""


@dataclass(frozen=True)
class Spectral(Sampling, Method):
    in_numba = True
    keep: Amount = 0.0625
    """Tokens read exactly per step, first and recent ones included: a fraction of the sequence's tokens, or a count."""
    choice: str = "sampled"
    rank: Amount | str = 0.5
    """Dimensions of a code: a fraction of the head dim, a count, or "variance:0.9". Codes take multiples of 16: other
    fractions are rounded up, other counts refused."""
    bits: int = 2
    """Bits of each dimension of a code: 2, 4 or 8."""
    rows: int | str = 16
    """Bits of keys and values: 16 keeps them in the model's dtype, 8 as codes; "xcla": as the stage `xcla` says."""
    sinks: int = 1
    """First tokens, always read."""
    recent: int = 16
    """Last tokens, always read; lowered, to no less than 1, where with the sinks they exceed half of `keep`."""
    residual: bool = True
    """Whether codewords stand for unselected tokens."""
    offload: str = "none"
    """"cpu": keys and values lie in host memory, and only what is read and not cached on the device is copied."""
    cached: int = 2048
    """With `offload`: tokens per KV head that are cached on the device."""

    def check(self) -> None:
        super().check()
        check_count("sinks", self.sinks)
        check_count("recent", self.recent, 1)
        check_flag("residual", self.residual)
        check_choice("offload", self.offload, ("none", "cpu"))
        check_count("cached", self.cached, 1)
        for name, bits, known in (("bits", self.bits, BITS), ("rows", self.rows, ROWS)):
            if type(bits) not in (int, str) or bits not in known:
                raise KvcalError(f"{name} {bits!r}: give {', '.join(map(str, known[:-1]))} or {known[-1]}")
        if self.rows == XCLA and self.offload != "none":
            raise KvcalError("rows xcla lie on the device: leave offload out")

    @classmethod
    def planning_grid(cls, head_dim: int, keeps: Sequence[float]) -> list[dict[str, Any]]:
        """With `rows=8`: at equal bytes 16 bits leave half as many tokens, and lose more (docs/results/real.md)."""
        settings = [(share, bits, keep) for share, bits in PLANNING_CODES for keep in keeps]
        grid = []
        for share, bits, keep in (*settings, PLANNING_RICHEST):
            step = STEP if head_dim % STEP == 0 else fields_of(bits)
            rank = min(head_dim, max(step, round(head_dim * share / step) * step))
            grid.append({"rank": rank, "bits": bits, "rows": 8, "keep": keep})
        return [setting for number, setting in enumerate(grid) if setting not in grid[:number]]

    def not_captured(self) -> str | None:
        if self.rows == XCLA:
            return "a step reads the caches of other layers"
        return None if self.offload == "none" else "an offloaded cache copies what the step selects"

    def not_paged(self) -> str | None:
        if self.rows == XCLA:
            return "with rows xcla a layer reads the pages of other layers, which an engine does not hand it"
        return None if self.offload == "none" else "an engine says itself where its pages lie: leave offload out"

    def captured_at(self, longest: int) -> bool:
        return self.not_captured() is None and self.is_scan(longest)

    def not_shared(self) -> str | None:
        return (
            "spectral's codebooks are of one layer's own keys and values: take loki with basis='pca', or a method "
            "without a basis"
        )

    def check_changed_keys(self, layer: int, bases: Mapping[str, Tensor]) -> None:
        raise KvcalError("spectral has no codebooks of keys that uptraining changed: take loki with basis='pca'")

    def bind(self, layer: int, head_dim: int, artifact: Artifact | None) -> SpectralPolicy:
        self.check()
        if artifact is None:
            raise KvcalError("spectral needs an artifact: make one with `calibrate pca` and pass it")
        spectrum = artifact.tensor("codebook", layer, "code.singular_values").square()
        rank = coded_rank(self.rank, rank_of(self.rank, spectrum), spectrum.shape[-1], self.bits)
        codewords = Codewords.load(artifact, layer, rank)
        if self.rows != XCLA:
            return SpectralPolicy(self, codewords)
        from .spectral_rows import GroupedRows  # which is a SpectralPolicy

        return GroupedRows(self, codewords, GroupCode.load(artifact, layer), earlier_layers(artifact, layer))


class SpectralPolicy(Policy):
    def __init__(self, settings: Spectral, codewords: Codewords):
        self.settings, self.codewords = settings, codewords
        self._scanned: dict[torch.device, Tables] = {}
        self.keeps_keys_values = settings.rows == 16
        self.largest = {"codeword": codewords.count - 1}
        self.fitted_to = codewords.heads, codewords.dims, codewords.value_dims
        self.summarised = ("value", "codeword") if self.keeps_keys_values else ("value", "value_scale")
        self.token_names = ("key", "value") if self.keeps_keys_values else ("key", "key_scale", "value", "value_scale")
        if settings.offload == "cpu":
            self.offloaded, self.cached = self.token_names, settings.cached

    def on_heads(self, heads: slice) -> SpectralPolicy:
        return SpectralPolicy(self.settings, self.codewords.on_heads(heads))

    def encode(self, key: Tensor, value: Tensor) -> Mapping[str, Tensor]:
        """Beside "key" and "value" also "codeword", "code" (both uint8) and "scale" (float16). With `rows=8` keys and
        values are uint8, and "key_scale" and "value_scale" are kept, too."""
        tables, coded = self.codewords.on(key.device), self.settings.rows == 8
        kept = encode_tokens(key, value, tables, self.settings.bits, coded)
        return kept if coded else {"key": key, "value": value, **kept}

    def summarise(self, page: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """ "correction" (uint8) and "correction_scale": the mean of v − v′ over a page's tokens, in 8 bits."""
        if not self.settings.residual:
            return {}
        of_head = {name: tensor.transpose(1, 2) for name, tensor in page.items()}
        tables = self.codewords.on(page["value"].device)
        return correction_of(of_head["value"], of_head.get("value_scale"), of_head.get("codeword"), tables)

    def append(self, cache: LayerCache, key: Tensor, value: Tensor) -> bool:
        scan = Scan.of(cache, lambda: self._scan(cache))
        if scan is None:
            return False
        key, value = key.squeeze(2).contiguous(), value.squeeze(2).contiguous()
        table = cache.metadata.table
        kernel = kernel_for(key, value, scan.tokens, paged=table is not None)
        if kernel == "reference":
            return False
        tables, held = self.codewords.on(key.device), cache.metadata.held()
        run_coded(kernel, key, value, scan.tokens, tables, held, self.settings.bits, table)
        return True

    def keys_values(self, cache: LayerCache) -> tuple[Tensor, Tensor]:
        if self.settings.rows == 16:
            return super().keys_values(cache)
        words = cache.tokens("codeword").squeeze(-1).long()
        key, key_scale, value, value_scale = (cache.tokens(name) for name in self.token_names)
        return self._decoded("key", key, key_scale, words), self._decoded("value", value, value_scale, words)

    def _decoded(self, name: str, code: Tensor, scale: Tensor, words: Tensor) -> Tensor:
        """float32 keys or values that are kept in 8 bits."""
        tables = self.codewords.on(code.device)
        return decode(code, scale.squeeze(-1), 8) @ tables[f"turn_{name}"] + tables[name][tables["head"], words]

    def step(self, query: Tensor, cache: LayerCache, spec: SoftmaxSpec) -> Attended:
        settings, metadata = self.settings, cache.metadata
        counts = metadata.once(
            (settings, type(settings.keep)), lambda: Counts.of(settings, metadata, settings.sinks, settings.recent)
        )
        if counts is None:
            return Attended(attend_all(self, query, cache, spec), None)
        sample = settings.sample if settings.choice == "sampled" else 0
        scan = Scan.of(cache, lambda: self._scan(cache))
        if scan is not None and (found := scan.step(query, cache, counts, settings.select, sample, spec)):
            return found
        grouped = query.squeeze(2).unflatten(1, (self.codewords.heads, -1)).float()
        tables, words = self.codewords.on(query.device), cache.tokens("codeword").squeeze(-1).long()
        estimated = self._estimate(tables, grouped, cache, words, spec).masked_fill(~counts.candidate, -torch.inf)
        selected = choose(estimated, counts, settings.select, sample)
        part = self._read(tables, grouped, cache, selected, words, spec)
        if settings.residual:
            part = merge(part, self._residual(tables, without(estimated, selected), cache, words, counts))
        out, lse = part
        if spec.sink_logits is not None:  # o · e^lse / (e^lse + e^sink)
            out = out * torch.sigmoid(lse - spec.sink_logits.float().view(1, *lse.shape[1:])).unsqueeze(-1)
        return Attended(out.flatten(1, 2).unsqueeze(2).to(query.dtype), selected)

    def _scan(self, cache: LayerCache) -> Scan | None:
        names = {"reduced": "code", "scale": "scale", "codeword": "codeword"}
        held = {part: cache.part(name) for part, name in names.items()}
        held |= {name: cache.part(name) for name in self.token_names}
        if self.settings.residual:
            held |= {name: cache.summary_part(name) for name in ("correction", "correction_scale")}
        device = held["key"].device
        if device not in self._scanned:  # where a captured step finds what was made of them, whatever buffers do
            tables = self.codewords.on(device)
            turns = (tables["turn_key"], tables["turn_value"]) if self.settings.rows == 8 else ()
            self._scanned[device] = Tables(tables["query_map"], tables["key"], tables["value"], *turns)
        return Scan(Tokens(**held), self._scanned[device], self.settings.bits, self.settings.residual)

    def _estimate(self, tables: ByName, grouped: Tensor, cache: LayerCache, words: Tensor, spec: SoftmaxSpec) -> Tensor:
        """[B, Hkv, G, S] float32: estimated logits of all tokens, from codeword and code."""
        codes, scale = cache.tokens("code").contiguous(), cache.tokens("scale").squeeze(-1)
        dots = products(grouped @ tables["query_map"], codes, scale, self.settings.bits)
        dots += (grouped @ tables["key"].mT).gather(-1, words.unsqueeze(2).expand_as(dots))
        return spec.logits(dots)

    def _read(
        self, tables: ByName, grouped: Tensor, cache: LayerCache, selected: Selected, words: Tensor, spec: SoftmaxSpec
    ) -> tuple[Tensor, Tensor]:
        """Exact attention to the selected tokens, in the form that `merge` takes. Keys and values of 8 bits stay
        rotated: the query and the output, which are fewer, are rotated instead."""
        index = selected.index
        flat, sizes = index.flatten(2), index.shape[2:]
        gathered = cache.gather(self.token_names, flat, selected.valid.flatten(2))
        if self.settings.rows == 16:
            key, value = gathered[0].float().unflatten(2, sizes), gathered[1].float().unflatten(2, sizes)
            dots = (grouped.unsqueeze(3) @ key.mT).squeeze(3)
        else:
            selected_words = words.gather(2, flat).unflatten(2, sizes).expand(*grouped.shape[:3], -1)
            key = decode(gathered[0], gathered[1].squeeze(-1), 8).unflatten(2, sizes)
            value = decode(gathered[2], gathered[3].squeeze(-1), 8).unflatten(2, sizes)
            dots = ((grouped @ tables["turn_key"].mT).unsqueeze(3) @ key.mT).squeeze(3)
            dots += (grouped @ tables["key"].mT).gather(-1, selected_words)
        weights, lse = normalised(spec.logits(dots).masked_fill(~selected.valid, -torch.inf))
        out = (weights.unsqueeze(3) @ value).squeeze(3)
        if self.settings.rows == 8:
            out = out @ tables["turn_value"] + self._by_codeword(tables, weights, selected_words)
        return out, lse

    def _by_codeword(self, tables: ByName, weights: Tensor, words: Tensor) -> Tensor:
        """[B, Hkv, G, Dv]: the sum of codewords' values with weights [B, Hkv, G, K], for `words` of the same shape."""
        sums = weights.new_zeros(*weights.shape[:3], self.codewords.count).scatter_add_(-1, words, weights)
        return sums @ tables["value"]

    def _residual(
        self, tables: ByName, estimated: Tensor, cache: LayerCache, words: Tensor, counts: Counts
    ) -> tuple[Tensor, Tensor]:
        """Residual attention: unselected tokens, approximated by their codewords' values and corrected by page, in the
        form that `merge` takes.

        Args:
            estimated: [B, Hkv, G, S] estimated logits of these tokens, -inf at all others.
        """
        weights, lse = normalised(estimated)
        out = self._by_codeword(tables, weights, words.unsqueeze(2).expand_as(weights))
        pages = estimated.shape[-1] // PAGE
        if pages and "correction" in cache.summaries:
            by_page = weights[..., : pages * PAGE].unflatten(-1, (pages, PAGE)).sum(-1).masked_fill(~counts.full, 0)
            codes, scale = cache.summary("correction"), cache.summary("correction_scale").squeeze(-1)
            out = out + by_page @ decode(codes[:, :, :pages], scale[:, :, :pages], 8)
        return out, lse

    def token_bytes(self, widths: Widths) -> int:
        return sum(widths[name] for name in self.token_names)

    def selection_bytes(self, reading: Reading) -> int:
        widths, lengths = reading.widths, reading.metadata.seq_lens.long()
        token = sum(widths[name] for name in ("codeword", "code", "scale"))
        page = widths["correction"] + widths["correction_scale"] if self.settings.residual else 0
        return reading.heads * (int(lengths.sum()) * token + int((lengths // PAGE).sum()) * page)

    def shared_bytes(self, widths: Widths) -> int:
        # Without the rotations, which a kernel need not read (`Codewords`).
        return self.codewords.nbytes("key", "value", "half", "query_map", "key_map")


def normalised(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(softmax over the last dimension, 0 where every logit is -inf; logarithm of the mass)."""
    lse = logits.logsumexp(-1)
    return (logits - lse.clamp_min(torch.finfo(lse.dtype).min).unsqueeze(-1)).exp(), lse


def merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention to two sets of tokens as one. Each set: (out [..., Dv], normalised over its tokens; lse [...], the
    logarithm of their mass)."""
    lse = torch.logaddexp(one[1], other[1])
    shares = (one[1] - lse).exp().unsqueeze(-1), (other[1] - lse).exp().unsqueeze(-1)
    return one[0] * shares[0] + other[0] * shares[1], lse


def without(logits: Tensor, chosen: Selected) -> Tensor:
    """`logits` [B, Hkv, G, S] with -inf at selected tokens."""
    shape = (*logits.shape[:3], -1)
    valid = chosen.valid.to(logits.dtype).expand(shape)
    times = torch.zeros_like(logits).scatter_add_(-1, chosen.index.expand(shape), valid)
    return logits.masked_fill(times > 0, -torch.inf)


def coded_rank(asked: Amount | str, dims: int, width: int, bits: int) -> int:
    """How many dimensions of a head dim `width` are coded: `dims`, rounded up to the multiple that codes are packed in.

    Args:
        asked: the user's rank, of which a count has to be such a multiple.
        dims: how many dimensions it means.

    Raises:
        KvcalError: a count that is not such a multiple, or a head dim of which no such multiple exists.
    """
    step = STEP if width % STEP == 0 else fields_of(bits)
    if isinstance(asked, int) and dims % step and dims != width:
        raise KvcalError(f"rank {asked}: codes take a multiple of {step}, e.g. {max(step, dims // step * step)}")
    dims = min(width, -(-dims // step) * step)
    if dims % fields_of(bits):
        raise KvcalError(
            f"a head dim of {width}: codes of {bits} bits take a multiple of {fields_of(bits)}: give a smaller rank, "
            "or more bits"
        )
    return dims
