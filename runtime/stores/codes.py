"""Low-bit codes of keys in a calibrated basis, and the logits that they stand for.

    q·k ≈ q·μ + (A q)·(s · code),    s · code ≈ B (k − μ)

with μ the mean key of the calibration text (after the rotary embedding, as all moments here) and A, B the two maps of a
basis. Each dimension of B is divided by the standard deviation of the keys there, and that of A multiplied by it, so
that all dimensions of a code use its few levels alike; of a token's dimensions the largest sets the scale s, times
`clip`. Deviations below a thousandth of the KV head's largest count as that: what is divided there would be rounding
errors.

What the basis leaves out has, over queries and keys of the calibration text, the variance σ² = tr(Fᵀ Mq F Σk) with
F = 1 − Aᵀ B, Mq = E[q qᵀ] and Σk the covariance of the keys. It averages out in a choice, but where exponentials are
summed it lifts their mean by e^{σ²/2}, which is what a normal distribution would do: logits get σ²/2 added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...artifacts import Artifact, KvcalError
from ...kernels.score import quantize, unpack
from ..attention import Logits
from .amounts import Amount, check_choice, check_number
from .basis import Basis

BITS = (2, 4, 8)
CLIP = {2: 0.8, 4: 1.0, 8: 1.0}
"""Shares of the largest magnitude that lost least on the demo model (two bits: 0.7 and 0.9 lose 4 % more)."""
LEAST_SPREAD = 1e-3
"""Of a dimension, as a share of the largest."""
REACH = 2.5
"""How far a cluster's best member is thought to lie along the query: a step of length ρ in a random one of r directions
changes the product with A q by ‖A q‖ ρ / √r, as a standard deviation, and so many of these are allowed for."""
STEP = 16
"""Ranks are multiples of it: what one tile of the kernels takes."""


class CodedBasis:
    """One object for all caches of a layer."""

    def __init__(self, query_map: Tensor, key_map: Tensor, mean: Tensor, variance: Tensor, bits: int, clip: float):
        """
        Args:
            query_map, key_map: [Hkv, r, D] float32.
            mean: [Hkv, D] of the keys.
            variance: [Hkv] of q·k − (A q)·(B (k − mean)).
        """
        self.bits, self.clip = bits, clip
        self.rank, self.key_shape = key_map.shape[1], key_map.shape
        offset = (key_map @ mean.unsqueeze(-1)).squeeze(-1)
        key_map = key_map.contiguous()  # for `append`
        self._parts = {(torch.device("cpu"), torch.float32): (query_map, key_map, mean, offset)}
        self._variance = {torch.device("cpu"): variance}
        self._query_sides: dict[torch.dtype, Tensor] = {}
        self._offsets: dict[torch.dtype, Tensor] = {}

    @classmethod
    def load(
        cls, artifact: Artifact, layer: int, rank: Amount | str, bits: int, clip: float | None, stage: str, basis: str
    ) -> CodedBasis:
        """Raises KvcalError: bits, clip or rank that mean nothing here."""
        if type(bits) is not int or bits not in BITS:
            raise KvcalError(f"bits {bits!r}: give 2, 4 or 8")
        if clip is not None:
            check_number("clip", clip, 0.01, 1.0, "a share of the largest magnitude")
        check_choice("stage", stage, ("pre", "post"))
        check_choice("basis", basis, ("pca", "score"))
        maps = Basis.load(artifact, layer, rank, stage=stage, basis=basis)
        width = maps.query_map.shape[-1]
        dims = coded_rank(rank, maps.rank, width, bits)
        maps = Basis.load(artifact, layer, dims, stage=stage, basis=basis)
        query_map, key_map = maps.query_map[:, :dims].double(), maps.key_map[:, :dims].double()
        keys, queries = (
            {part: artifact.finite("moments", layer, f"{name}_post.{part}").double() for part in ("mean", "covariance")}
            for name in ("key", "query")
        )
        second_moment = queries["covariance"] + queries["mean"].unsqueeze(-1) * queries["mean"].unsqueeze(-2)
        missed = torch.eye(width, dtype=torch.float64) - query_map.mT @ key_map
        variance = torch.einsum("hij,hik,hkl,hlj->h", missed, second_moment, missed, keys["covariance"])
        spread = (key_map @ keys["covariance"] * key_map).sum(-1, keepdim=True).clamp_min(0).sqrt()
        spread = spread.clamp_min(LEAST_SPREAD * spread.amax(1, keepdim=True))
        spread = torch.where(spread > 0, spread, 1.0)
        whitened = (query_map * spread).float(), (key_map / spread).float()
        clip = CLIP[bits] if clip is None else clip
        return cls(*whitened, keys["mean"].float(), variance.float(), bits, clip)

    def parts(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(query map, key map, mean key, what the key map makes of it) on the device and in the dtype of `like`."""
        place = (like.device, like.dtype)
        if place not in self._parts:
            first = next(iter(self._parts.values()))
            self._parts[place] = tuple(part.to(like) for part in first)  # type: ignore[assignment]
        return self._parts[place]

    def query_side(self, like: Tensor) -> Tensor:
        """[Hkv, D, r + 1] float32: what multiplies queries like these, the mean key last."""
        if like.dtype not in self._query_sides or self._query_sides[like.dtype].device != like.device:
            query_map, _, mean, _ = self.parts(like)
            side = torch.cat((query_map, mean.unsqueeze(1)), 1).float().mT.contiguous()
            self._query_sides[like.dtype] = side
        return self._query_sides[like.dtype]

    def offset(self, like: Tensor) -> Tensor:
        """[Hkv, r] float32: what is taken off keys like these after their projection."""
        if like.dtype not in self._offsets or self._offsets[like.dtype].device != like.device:
            self._offsets[like.dtype] = self.parts(like)[3].float().contiguous()
        return self._offsets[like.dtype]

    def correction(self, like: Tensor, scaling: float) -> Tensor:
        """[Hkv] float32: σ²/2 of the logits."""
        if like.device not in self._variance:
            self._variance[like.device] = next(iter(self._variance.values())).to(like.device)
        return 0.5 * scaling**2 * self._variance[like.device]

    def encode(self, key: Tensor, bits: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys [B, Hkv, S, D] as (codes, scales [B, Hkv, S, 1] float16), see `kernels.score.quantize`."""
        clip = self.clip if bits is None else CLIP[bits]
        codes, scales = quantize(self.project(key), self.bits if bits is None else bits, clip)
        assert scales is not None
        return codes, scales.unsqueeze(-1)

    def project(self, key: Tensor) -> Tensor:
        """[B, Hkv, S, r] float32: what is coded of keys [B, Hkv, S, D]."""
        _, key_map, _, offset = self.parts(key)
        # As the kernel does it, which cannot subtract before it projects.
        return key.float() @ key_map.float().mT - offset.float().unsqueeze(-2)

    def logits(
        self,
        query: Tensor,
        codes: Tensor,
        scales: Tensor,
        logits: Logits,
        bits: int | None = None,
        radius: Tensor | None = None,
    ) -> Tensor:
        """float32 logits of every query against every code.

        Args:
            query: [B, Hkv, G, D].
            codes, scales: [B, Hkv, S, …], or [B, Hkv, G or 1, S, …] where query heads have tokens of their own.
            radius: [B, Hkv, S]: the logits are those of likely members so far from the code, see `REACH`.
        """
        query_map, _, mean, _ = self.parts(query)
        part = query.float() @ query_map.float().mT
        held = unpack(codes, self.bits if bits is None else bits) * scales.float()
        dots = part @ held.mT if held.dim() == 4 else (part.unsqueeze(3) @ held.mT).squeeze(3)
        base = query.float() @ mean.float().unsqueeze(-1)
        if radius is not None:
            dots = dots + REACH * self.rank**-0.5 * part.norm(dim=-1, keepdim=True) * radius.float().unsqueeze(2)
        return logits.of(dots + base) + self.correction(query, logits.scaling).view(-1, 1, 1)

    def radii(self, key: Tensor, owner: Tensor, clusters: int) -> Tensor:
        """[B, Hkv, C] float32: how far the farthest member of each cluster lies from its mean, as codes measure.

        Args:
            key: [B, Hkv, S, D].
            owner: [B, Hkv, S] int64, C where a token is in no cluster.
            clusters: C.
        """
        _, key_map, _, _ = self.parts(key)
        points = key.float() @ key_map.float().mT
        index = owner.unsqueeze(-1).expand_as(points)
        sums = points.new_zeros(*points.shape[:2], clusters + 1, points.shape[-1]).scatter_add(2, index, points)
        sizes = points.new_zeros(*points.shape[:2], clusters + 1).scatter_add(2, owner, torch.ones_like(points[..., 0]))
        means = sums / sizes.clamp_min(1).unsqueeze(-1)
        far = (points - means.gather(2, index)).norm(dim=-1)
        return far.new_zeros(sizes.shape).scatter_reduce(2, owner, far, "amax")[..., :clusters]

    def nbytes(self, like: Tensor) -> int:
        """Read once per step for the query and the new key."""
        return sum(part.nbytes for part in self.parts(like)) + self._variance[torch.device("cpu")].nbytes


def coded_rank(rank: Amount | str, dims: int, width: int, bits: int) -> int:
    """Dimensions that are coded: fractions are rounded up to what the codes are packed in.

    Raises:
        KvcalError: a count that cannot be packed so.
    """
    packed = max(8 // bits, 2)  # the mean keys of clusters have 4 bits, whatever the tokens have
    step = STEP if width % STEP == 0 else packed
    if isinstance(rank, int) and dims % step and dims != width:
        raise KvcalError(f"rank {rank}: codes take a multiple of {step}, e.g. {max(step, dims // step * step)}")
    dims = min(width, -(-dims // step) * step)
    if dims % packed:
        more = ", or more bits" if packed > 2 and dims % 2 == 0 else ""
        raise KvcalError(
            f"a head dim of {width}: codes of {bits} bits take a multiple of {packed}: give a smaller rank{more}"
        )
    return dims
