"""Claims about the values of a tensor, and the one-line error that names the first value that breaks one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .errors import ArtifactError

MOST = 1e18
"""Largest magnitude of keys, queries, values and maps: float32 holds its square, which attention computes."""
ROUNDING = 1e-4
"""Allowed error of products of float32 rows, relative to their lengths: sums of 512 products round by 3e-5 at most."""
MEAN_ROUNDING = 1e-6
"""Allowed relative error by which rounding may take a mean or a quantile above the largest of its samples."""


def require(where: str, name: str, holds: Tensor, found: Tensor, expected: str, *, by_head: bool = True) -> None:
    """Raise ArtifactError for the first entry of a tensor that does not hold.

    Args:
        where: the file.
        name: of the tensor, with its layer.
        holds: bool, of the shape of `found`: which entries are as expected.
        by_head: the first dimension is that of KV heads.
    """
    if bool(holds.all()):
        return
    index = (~holds).nonzero()[0].tolist()
    value = found[tuple(index)].item()
    head = f", KV head {index.pop(0)}" if by_head and index else ""
    entry = f", entry {', '.join(map(str, index))}" if index else ""
    raise ArtifactError(f"{where}: {name}{head}{entry} is {value:.6g}, expected {expected}: {_REMEDY}")


def require_that(where: str, name: str, holds: bool, found: object, expected: str) -> None:
    """`require` for something that is no tensor."""
    if not holds:
        raise ArtifactError(f"{where}: {name} is {str(found)[:80]}, expected {expected}: {_REMEDY}")


def bounded(
    where: str, name: str, found: Tensor, least: float = -MOST, most: float = MOST, *, by_head: bool = True
) -> None:
    """No NaN, no infinity, nothing out of bounds."""
    if found.element_size() == 2:
        found = found.float()  # in float16 the bounds would round to infinity, and admit it
    holds, expected = (found >= least) & (found <= most), f"a number from {least:g} to {most:g}"
    require(where, name, holds, found, expected, by_head=by_head)


def descending(where: str, name: str, found: Tensor) -> None:
    """[Hkv, n] descends along n, equal neighbours allowed."""
    falls = torch.ones_like(found, dtype=torch.bool)
    falls[:, 1:] = found[:, 1:] <= found[:, :-1]
    require(where, name, falls, found, "no more than the entry before it")


def spectrum(where: str, name: str, found: Tensor) -> None:
    """[Hkv, D] not negative and descending, exactly: writers clamp and sort, so rounding excuses nothing."""
    bounded(where, name, found, 0, MOST**2)
    descending(where, name, found)


def products(
    where: str,
    name: str,
    rows: Tensor,
    other: Tensor,
    expected: Tensor,
    what: str,
    more: Callable[[], Tensor] | None = None,
) -> None:
    """Products of every row of `rows` with every row of `other`, [Hkv, D, D] each, are as expected up to ROUNDING.

    ROUNDING is relative to the product of the rows' lengths; NaN does not hold.

    Args:
        more: gives how far they may be off besides; called only where ROUNDING does not suffice.
    """
    found = rows @ other.mT
    off = (found - expected).abs()
    allowed = ROUNDING * rows.norm(dim=-1).unsqueeze(-1) * other.norm(dim=-1).unsqueeze(-2)
    if more is not None and not bool((off <= allowed).all()):
        allowed = allowed + more()
    require(where, name, off <= allowed, found, what)


_REMEDY = "fetch or calibrate it again"
