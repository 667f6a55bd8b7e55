"""`spectral`: low-bit codes choose, exact rows answer, codewords stand for the rest.

Every token (k, v) belongs to a codeword (k′, v′) of a codebook that was calibrated offline (`calibrate/codebook.py`).
Kept beside its key and value are the codeword's number and a code of k − k′ in the basis that is best for q·(k − k′),
rotated so that few bits serve all dimensions alike (`kernels/codes`). A step

1. estimates every logit by codeword and code, ŝ = q·k′ + (q A)·(s · levels),
2. reads the first tokens, the most recent ones and the best by ŝ exactly,
3. lets the codeword's value stand for each token that was not read, and corrects it by page:

    out = (Σ_read e^{q·k} v + Σ_other e^{ŝ} (v′ + d)) / (Σ_read e^{q·k} + Σ_other e^{ŝ})

with d the mean of v − v′ over the token's page, 0 until the page is full. Sums over tokens that were not read are sums
of masses by codeword and by page, each with one product.

With `rows=8` keys and values are kept as codeword and 8-bit code of what it leaves, rotated: half the memory and bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...artifacts import Artifact, KvcalError
from ...kernels.codes import BITS, decode, encode, fields_of, products
from ..attention import Logits
from ..kv.pages import PAGE, LayerCache
from .amounts import Amount, check_choice, check_count, check_flag
from .base import Attended, Method, Policy, Reading, Selected, Widths
from .basis import rank_of
from .choosing import Counts, Sampling, choose, shared
from .codewords import Codewords, nearest
from .full import attend_all

Tables = Mapping[str, Tensor]
"""Of `Codewords.on`."""
STEP = 16
"""Ranks are multiples of it: what one tile of a kernel takes."""


@dataclass(frozen=True)
class Spectral(Sampling, Method):
    keep: Amount = 0.0625
    """Tokens read exactly per step, first and recent ones included: a fraction of the sequence's tokens, or a count."""
    choice: str = "sampled"
    rank: Amount | str = 0.5
    """Dimensions of a code: a fraction of the head dim, a count, or "variance:0.9"; a multiple of 16."""
    bits: int = 2
    """Of each dimension of a code: 2, 4 or 8."""
    rows: int = 16
    """Bits of keys and values: 16 as the model gives them, whatever its dtype; or 8."""
    sinks: int = 1
    """First tokens, always read."""
    recent: int = 16
    """Last tokens, always read; with the sinks half of `keep` at most."""
    residual: bool = True
    """Whether codewords stand for what is not read."""
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
        for name, bits, known in (("bits", self.bits, BITS), ("rows", self.rows, (16, 8))):
            if type(bits) is not int or bits not in known:
                raise KvcalError(f"{name} {bits!r}: give {', '.join(map(str, known[:-1]))} or {known[-1]}")

    def not_captured(self) -> str | None:
        return None if self.offload == "none" else "an offloaded cache copies what the step selects"

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
        return SpectralPolicy(self, Codewords(artifact, layer, rank))


class SpectralPolicy(Policy):
    def __init__(self, settings: Spectral, codewords: Codewords):
        self.settings, self.codewords = settings, codewords
        self.keeps_keys_values = settings.rows == 16
        self.most = {"codeword": codewords.count - 1}
        self.fitted_to = codewords.heads, codewords.dims, codewords.value_dims
        self.summarised = ("value", "codeword") if self.keeps_keys_values else ("value", "value_scale")
        self.token_names = ("key", "value") if self.keeps_keys_values else ("key", "key_scale", "value", "value_scale")
        if settings.offload == "cpu":
            self.offloaded, self.cached = self.token_names, settings.cached

    def encode(self, key: Tensor, value: Tensor) -> Mapping[str, Tensor]:
        """Beside "key" and "value" "codeword", "code" (both uint8) and "scale" (float16). Keys and values of 8 bits are
        uint8, with "key_scale" and "value_scale"."""
        of = self.codewords.on(key.device)
        words = nearest(of, key, value)
        left = key.float() - of["key"][of["head"], words]
        code, scale = encode(left @ of["key_map"], self.settings.bits)
        kept = {"codeword": words.unsqueeze(-1).to(torch.uint8), "code": code, "scale": scale.unsqueeze(-1)}
        if self.settings.rows == 16:
            return {"key": key, "value": value, **kept}
        for name, rest in (("key", left), ("value", value.float() - of["value"][of["head"], words])):
            kept[name], of_row = encode(rest @ of[f"turn_{name}"].mT, 8)
            kept[f"{name}_scale"] = of_row.unsqueeze(-1)
        return kept

    def summarise(self, page: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """ "correction" (uint8) and "correction_scale": the mean of v − v′ over a page's tokens, in 8 bits."""
        if not self.settings.residual:
            return {}
        value, of = page["value"].transpose(1, 2), self.codewords.on(page["value"].device)
        if self.settings.rows == 16:
            words = page["codeword"].squeeze(-1).transpose(1, 2).long()
            left = (value.float() - of["value"][of["head"], words]).mean(2)
        else:
            left = decode(value, page["value_scale"].transpose(1, 2).squeeze(-1), 8).mean(2) @ of["turn_value"]
        code, scale = encode(left, 8)
        return {"correction": code, "correction_scale": scale.unsqueeze(-1)}

    def keys_values(self, cache: LayerCache) -> tuple[Tensor, Tensor]:
        if self.settings.rows == 16:
            return super().keys_values(cache)
        words = cache.tokens("codeword").squeeze(-1).long()
        key, key_scale, value, value_scale = (cache.tokens(name) for name in self.token_names)
        return self._decoded("key", key, key_scale, words), self._decoded("value", value, value_scale, words)

    def _decoded(self, name: str, code: Tensor, scale: Tensor, words: Tensor) -> Tensor:
        """float32 keys or values that are kept in 8 bits."""
        of = self.codewords.on(code.device)
        return decode(code, scale.squeeze(-1), 8) @ of[f"turn_{name}"] + of[name][of["head"], words]

    def step(self, query: Tensor, cache: LayerCache, logits: Logits) -> Attended:
        settings, metadata = self.settings, cache.metadata
        counts = metadata.once(
            (settings, type(settings.keep)), lambda: Counts.of(settings, metadata, settings.sinks, settings.recent)
        )
        if counts is None:
            key, value = (of.to(query.dtype) for of in self.keys_values(cache))
            return Attended(attend_all(query, key, value, metadata, logits), None)
        grouped = query.squeeze(2).unflatten(1, (self.codewords.heads, -1)).float()
        of, words = self.codewords.on(query.device), cache.tokens("codeword").squeeze(-1).long()
        estimated = self._estimate(of, grouped, cache, words, logits).masked_fill(~counts.candidate, -torch.inf)
        scores = shared(estimated, settings.select)
        selected = choose(scores, counts, settings.sample if settings.choice == "sampled" else 0)
        part = self._read(of, grouped, cache, selected, words, logits)
        if settings.residual:
            part = merge(part, self._residual(of, without(estimated, selected), cache, words, counts))
        out, lse = part
        if logits.sinks is not None:
            out = out * torch.sigmoid(lse - logits.sinks.float().view(1, *lse.shape[1:])).unsqueeze(-1)
        return Attended(out.flatten(1, 2).unsqueeze(2).to(query.dtype), selected)

    def _estimate(self, of: Tables, grouped: Tensor, cache: LayerCache, words: Tensor, logits: Logits) -> Tensor:
        """[B, Hkv, G, S] float32 logits of all tokens, by codeword and code."""
        codes, scale = cache.tokens("code").contiguous(), cache.tokens("scale").squeeze(-1)
        dots = products(grouped @ of["query_map"], codes, scale, self.settings.bits)
        dots += (grouped @ of["key"].mT).gather(-1, words.unsqueeze(2).expand_as(dots))
        return logits.of(dots)

    def _read(
        self, of: Tables, grouped: Tensor, cache: LayerCache, selected: Selected, words: Tensor, logits: Logits
    ) -> tuple[Tensor, Tensor]:
        """Exact attention to the selected tokens, see `merge`. Rows of 8 bits stay turned: the query and the output
        turn, which are fewer."""
        index = selected.index
        flat, apart = index.flatten(2), index.shape[2:]
        rows = cache.gather(self.token_names, flat, selected.valid.flatten(2))
        if self.settings.rows == 16:
            key, value = rows[0].float().unflatten(2, apart), rows[1].float().unflatten(2, apart)
            dots = (grouped.unsqueeze(3) @ key.mT).squeeze(3)
        else:
            own = words.gather(2, flat).unflatten(2, apart).expand(*grouped.shape[:3], -1)
            key = decode(rows[0], rows[1].squeeze(-1), 8).unflatten(2, apart)
            value = decode(rows[2], rows[3].squeeze(-1), 8).unflatten(2, apart)
            dots = ((grouped @ of["turn_key"].mT).unsqueeze(3) @ key.mT).squeeze(3)
            dots += (grouped @ of["key"].mT).gather(-1, own)
        weights, lse = normalised(logits.of(dots).masked_fill(~selected.valid, -torch.inf))
        out = (weights.unsqueeze(3) @ value).squeeze(3)
        if self.settings.rows == 8:
            out = out @ of["turn_value"] + self._by_codeword(of, weights, own)
        return out, lse

    def _by_codeword(self, of: Tables, weights: Tensor, words: Tensor) -> Tensor:
        """[B, Hkv, G, Dv]: of weights [B, Hkv, G, K] and codewords of the same shape, the sum of the values."""
        sums = weights.new_zeros(*weights.shape[:3], self.codewords.count).scatter_add_(-1, words, weights)
        return sums @ of["value"]

    def _residual(
        self, of: Tables, rest: Tensor, cache: LayerCache, words: Tensor, counts: Counts
    ) -> tuple[Tensor, Tensor]:
        """Attention to unselected tokens by their codewords' values, corrected by page, see `merge`.

        Args:
            rest: [B, Hkv, G, S] estimated logits of these tokens, -inf of all others.
        """
        weights, lse = normalised(rest)
        out = self._by_codeword(of, weights, words.unsqueeze(2).expand_as(weights))
        pages = rest.shape[-1] // PAGE
        if pages:
            by_page = weights[..., : pages * PAGE].unflatten(-1, (pages, PAGE)).sum(-1).masked_fill(~counts.full, 0)
            codes, scale = cache.of_pages("correction"), cache.of_pages("correction_scale").squeeze(-1)
            out = out + by_page @ decode(codes[:, :, :pages], scale[:, :, :pages], 8)
        return out, lse

    def token_bytes(self, widths: Widths) -> int:
        return sum(widths[name] for name in self.token_names)

    def index_bytes(self, reading: Reading) -> int:
        widths, lengths = reading.widths, reading.metadata.seq_lens.long()
        token = sum(widths[name] for name in ("codeword", "code", "scale"))
        page = widths["correction"] + widths["correction_scale"] if self.settings.residual else 0
        return reading.heads * (int(lengths.sum()) * token + int((lengths // PAGE).sum()) * page)

    def shared_bytes(self, widths: Widths) -> int:
        # Not the rotations: see `Codewords`.
        return self.codewords.nbytes("key", "value", "half", "query_map", "key_map")


def normalised(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(softmax over the last dimension, 0 where every logit is -inf; logarithm of the mass)."""
    lse = logits.logsumexp(-1)
    return (logits - lse.clamp_min(torch.finfo(lse.dtype).min).unsqueeze(-1)).exp(), lse


def merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention to two sets of tokens as one. Each: (out [..., Dv] normalised by itself, lse [...] log of its mass)."""
    lse = torch.logaddexp(one[1], other[1])
    shares = (one[1] - lse).exp().unsqueeze(-1), (other[1] - lse).exp().unsqueeze(-1)
    return one[0] * shares[0] + other[0] * shares[1], lse


def without(logits: Tensor, chosen: Selected) -> Tensor:
    """[B, Hkv, G, S]: -inf at tokens that were chosen."""
    shape = (*logits.shape[:3], -1)
    valid = chosen.valid.to(logits.dtype).expand(shape)
    times = torch.zeros_like(logits).scatter_add_(-1, chosen.index.expand(shape), valid)
    return logits.masked_fill(times > 0, -torch.inf)


def coded_rank(asked: Amount | str, dims: int, width: int, bits: int) -> int:
    """Dimensions that are coded of a head dim `width`: fractions are rounded up to what codes are packed in.

    Raises:
        KvcalError: a count that cannot be packed so.
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
