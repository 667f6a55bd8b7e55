"""Saved codes of `spectral`: those of the keys beside them, and of the clusters' means."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.score import unpack
from ...kernels.score.quantize import FIRST, LARGEST, LARGEST_SCALE, LAST, ROUNDING, fields_of
from .codes import CLIP, CodedBasis
from .saved import Saved, require
from .saved_clusters import SavedClusters, means_of

PROJECTION = 1e-3
"""Relative: how far what is coded may be off where another device projected it."""


def check_codes(saved: Saved, basis: CodedBasis) -> None:
    """Of every token. Raises KvcalError for a code or scale that is not of its key."""
    codes, scales = _take(saved, "rows.code", "rows.scale", saved.key.shape[:3], basis.rank, basis.bits)
    _check_levels("code", codes, scales, basis.project(saved.key), basis.bits, basis.clip, saved.held, PROJECTION)


def check_coded_means(
    saved: Saved, basis: CodedBasis, found: SavedClusters, owners: Sequence[Tensor], bits: tuple[int, int]
) -> None:
    """Of every cluster: codes of its mean key and value, in so many bits, and how far its members lie from it."""
    shape, there = found.sizes.shape, (found.sizes > 0).unsqueeze(-1)
    keys, values = (means_of(rows, owners, found).to(rows.dtype) for rows in (saved.key, saved.value))
    eps = torch.finfo(keys.dtype).eps  # sums in another order may round to a neighbouring number
    for name, means, of, clip, error in (
        ("cluster.key", basis.project(keys), bits[0], CLIP[bits[0]], max(eps, PROJECTION)),
        ("cluster.value", values.float(), bits[1], 1.0, torch.finfo(values.dtype).eps),
    ):
        codes, scales = _take(saved, f"rows.{name}", f"rows.{name}_scale", shape, means.shape[-1], of)
        _check_levels(name, codes, scales, means, of, clip, there, error)
    radius = saved.take("rows.cluster.radius", torch.float16, *shape, 1).float().squeeze(-1)
    none = shape[2]
    owner = torch.full(saved.key.shape[:3], none)
    for row, of_row in enumerate(owners):
        owner[row, :, found.sinks : found.sinks + of_row.shape[1]] = of_row
    wanted = basis.radii(saved.key, owner, none)
    off = (radius - wanted).abs()
    allowed = 0.01 * wanted + 1e-3 * wanted.amax()
    require("cluster.radius", (off <= allowed) | ~there.squeeze(-1), "how far its farthest token lies")


def _take(saved: Saved, name: str, of_scales: str, shape: Sequence[int], dims: int, bits: int) -> tuple[Tensor, Tensor]:
    dtype = torch.int8 if bits == 8 else torch.uint8
    return saved.take(name, dtype, *shape, dims // fields_of(bits)), saved.take(of_scales, torch.float16, *shape, 1)


def _check_levels(
    name: str, codes: Tensor, scales: Tensor, found: Tensor, bits: int, clip: float, there: Tensor, off: float
) -> None:
    """Codes and scales are what `quantize` makes of numbers like `found`, but for a relative `off`, where `there`."""
    scales = scales.float()
    wanted = (found.abs().amax(-1, keepdim=True) * clip / LARGEST[bits]).clamp(max=LARGEST_SCALE)
    require(
        f"{name} scale", ((scales - wanted).abs() <= 0.02 * wanted + 1e-7) | ~there, "that of its largest dimension"
    )
    at = found / scales.where(scales > 0, torch.inf) + ROUNDING[bits]
    slack = 0.01 + off * LARGEST[bits]
    least, most = (torch.floor(at + way * slack).clamp(FIRST[bits], LAST[bits]) for way in (-1, 1))
    integers = unpack(codes, bits) + ROUNDING[bits] - 0.5
    require(name, ((least <= integers) & (integers <= most)) | ~there, "the level nearest to what it stands for")
