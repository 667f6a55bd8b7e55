"""One call per decoded token: the new key and value into the cache, and what a method keeps beside them."""

import torch
from torch import Tensor

from ..backend import choose
from ..codes import BITS, Calibrated, fields_of
from ..pages import PAGE
from ..pages.table import check_table
from ..scan.operands import Tokens
from . import reference

__all__ = ["append", "append_coded", "kernel_for", "run_coded"]


def append(
    key_new: Tensor,
    value_new: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    *,
    table: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Writes one token of each sequence at slot `lengths[b]`; `lengths` itself is advanced by the caller.

    A full sequence (lengths[b] == capacity) is left alone, and so is one of a negative length, which pads a batch.

    Args:
        key_new: [B, Hkv, D], as it is to be stored.
        value_new: [B, Hkv, Dv].
        key: [B, Hkv, capacity, D], contiguous per token, as the values.
        value: [B, Hkv, capacity, Dv].
        lengths: [B] int32 on the same device: tokens held before this one.
        table: [B, P] int32 or int64, the pages of each sequence (see `kernels/pages`): key and value are
            [N, Hkv, PAGE, …] with it, and the capacity is P · PAGE. No two sequences may write to one page.
    """
    check_cache("key", key_new, key, lengths, table)
    check_cache("value", value_new, value, lengths, table)
    check_table(table, key_new.shape[0], key.device)
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(f"value: received {list(value.shape)}, expected {list(key.shape[:3])} before its last")
    if lengths.dtype != torch.int32 or lengths.device != key.device:
        raise ValueError(f"lengths: received {lengths.dtype} on {lengths.device}, expected int32 on {key.device}")
    run = reference.append
    if choose(backend, key) == "triton":
        from .triton_kernel import append as run
    run(key_new, value_new, key, value, lengths, table)


def append_coded(
    key_new: Tensor, value_new: Tensor, tokens: Tokens, tables: Calibrated, lengths: Tensor, *, bits: int,
    table: Tensor | None = None, backend: str = "auto",
) -> None:  # fmt: skip
    """The same with what is kept of tokens to scan them: codewords, codes, rows in 8 bits where they are kept so, and
    the correction of a page that the token fills (see `kernels/scan` and `kernels/codes`).

    Args:
        key_new: [B, Hkv, D], as it came.
        value_new: [B, Hkv, Dv].
        tables: of the layer.
        lengths: as of `append`.
        bits: of the codes, 2, 4 or 8.
        table: [B, P] whole numbers, the block table; None: tokens are by sequence.
    """
    if tokens.codeword is None or tokens.scale is None:
        raise ValueError("tokens: received some without codewords, expected codes")
    if bits not in BITS or tokens.reduced.shape[3] * fields_of(bits) != tables["key_map"].shape[2]:
        raise ValueError(
            f"bits: received {bits} for {tokens.reduced.shape[3]} bytes of a code, expected one of {BITS} that gives "
            f"the {tables['key_map'].shape[2]} dimensions of key_map"
        )
    for name, held in (("key", tokens.key), ("value", tokens.value)):
        if tables[name].shape[::2] != held.shape[1::2]:
            raise ValueError(f"{name}: received codewords {list(tables[name].shape)} for tokens {list(held.shape)}")
    check_table(table, len(key_new), key_new.device)
    kernel = kernel_for(key_new, value_new, tokens, paged=table is not None, backend=backend)
    run_coded(kernel, key_new, value_new, tokens, tables, lengths, bits, table)


def run_coded(
    kernel: str, key_new: Tensor, value_new: Tensor, tokens: Tokens, tables: Calibrated, lengths: Tensor, bits: int,
    table: Tensor | None,
) -> None:  # fmt: skip
    """`append_coded` with what `kernel_for` says, of tables and bits that fit what is kept."""
    fits = key_new.shape[1:] == tokens.key.shape[1::2] and value_new.shape[1:] == tokens.value.shape[1::2]
    whole = len(key_new) == len(tokens.key if table is None else table)
    if not (fits and whole and lengths.shape == key_new.shape[:1] == value_new.shape[:1]):
        raise ValueError(
            f"key_new: received {list(key_new.shape)}, values {list(value_new.shape)}, lengths {list(lengths.shape)} "
            f"for tokens {list(tokens.key.shape)} and {list(tokens.value.shape)}"
        )
    if lengths.dtype != torch.int32:
        raise ValueError(f"lengths: received {lengths.dtype}, expected int32")
    if kernel == "triton":
        from .coded_kernel import append_coded as run
    elif kernel == "numba":
        from .launch import append_coded as run
    else:
        run = reference.append_coded
    run(key_new, value_new, tokens, tables, lengths, bits, table)


REFUSED = {
    "triton": (
        "backend: 'triton' takes tokens of one order or pages in one piece, and contiguous numbers of a token: use "
        "'reference'"
    ),
    "numba": (
        "backend: 'numba' takes float32, bfloat16 or float16, tokens that lie whole rows apart, contiguous new tokens "
        "of the dtype of those that are kept, and a multiple of 4 bytes of codes: use 'reference'"
    ),
}


def kernel_for(
    key_new: Tensor, value_new: Tensor, tokens: Tokens, *, paged: bool = False, backend: str = "auto"
) -> str:
    """ "triton" or "numba" for `append_coded`; "reference" where neither takes these operands.

    Args:
        paged: whether there is a block table.

    Raises:
        ValueError: `backend` names one that does not.
    """
    chosen = choose(backend, key_new, numba=True)
    if chosen == "triton":
        fits = tokens.fits_triton(paged) and key_new.stride(-1) == value_new.stride(-1) == 1
    elif chosen == "numba":
        alike = key_new.dtype == value_new.dtype and tokens.key.dtype in (key_new.dtype, torch.uint8)
        fits = tokens.fits_numba and alike and key_new.is_contiguous() and value_new.is_contiguous()
    else:
        fits = True
    if not fits and backend != "auto":
        raise ValueError(REFUSED[chosen])
    return chosen if fits else "reference"


def check_cache(name: str, new: Tensor, cache: Tensor, lengths: Tensor, table: Tensor | None = None) -> None:
    fits = new.dim() == 3 and cache.dim() == 4 and new.shape[1:] == cache.shape[1::2]
    fits = fits and (new.shape[0] == cache.shape[0] if table is None else cache.shape[2] == PAGE)
    if not fits or lengths.shape != new.shape[:1]:
        expected = "[B, Hkv, capacity, D]" if table is None else f"[N, Hkv, {PAGE}, D]"
        raise ValueError(
            f"{name}: received {list(new.shape)} for a cache {list(cache.shape)} and lengths {list(lengths.shape)}, "
            f"expected [B, Hkv, D], {expected} and [B]"
        )
    if new.stride(-1) != 1 or cache.stride(-1) != 1:
        raise ValueError(f"{name}: expected the numbers of one token to be contiguous")
