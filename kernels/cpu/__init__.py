"""What kernels in numba share: how they are compiled, which threads run them, and tensors as the arrays that they take.

Imports numba. What was compiled is kept on disk, see `cache_folder`: a machine compiles it once.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..backend import refuse_numba

BFLOAT16, FLOAT16, FLOAT32 = 16, 17, 32
"""Kinds of floating-point numbers, as kernels are told them."""
KINDS = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.float32: FLOAT32}
BITS_AS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""The dtype that numbers of so many bytes are passed as: numba has none for bfloat16, nor arithmetic on float16."""
LOG2_E = 1.4426950408889634
PER_THREAD = 4
"""Ranges for each thread, at least, where there are tokens enough: threads then end at nearly the same time."""
FASTMATH = {"nsz", "arcp", "contract", "reassoc"}
"""Sums may be taken in another order. What is not a number is not carried through to a result."""
_running = threading.Lock()
_short: WeakIdKeyDictionary = WeakIdKeyDictionary()
# GNU's OpenMP ends a forked process that would use threads of its parent's.
os.register_at_fork(after_in_child=refuse_numba)


def cache_folder() -> str:
    """Where what was compiled is kept; "" where no such folder can be written. Named by the sources of all kernels: by
    itself numba compiles a function again when its own file changes, not when one does that it calls."""
    kernels = Path(__file__).parent.parent
    sources = sorted(kernels.rglob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    for base in filter(None, (numba.config.CACHE_DIR, kernels / "__pycache__", Path.home() / ".cache" / "kvcal")):
        folder = Path(base) / f"numba-{digest}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return str(folder)
    return ""


CACHE = cache_folder()


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """The decorator of every kernel and of every function in one.

    Without numba's reference counts (`_nrt`), which would take most of the time that compiling takes: so no kernel
    makes an array. The body of a `prange` only calls a function: what it writes itself to arrays of a tuple is lost.
    """

    def compile_later(function: Callable[..., Any]) -> Any:
        before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, CACHE
        try:
            return numba.njit(
                cache=bool(CACHE), nogil=True, error_model="numpy", fastmath=FASTMATH, _nrt=False, **options
            )(function)
        finally:
            numba.config.CACHE_DIR = before

    return compile_later


def run(kernel: Callable[..., Any], *operands: Any) -> Any:
    """Call a parallel kernel with as many threads as torch has now.

    One at a time: numba's own pool of threads, where OpenMP is missing, ends the process otherwise.
    """
    threads = torch.get_num_threads()
    wanted = min(threads, numba.config.NUMBA_NUM_THREADS)
    with _running:
        before = numba.get_num_threads()
        if before != wanted:
            numba.set_num_threads(wanted)
        try:
            return kernel(*operands)
        finally:
            if before != wanted:
                numba.set_num_threads(before)
            if torch.get_num_threads() != threads:  # numba starts its threads, and tells the OpenMP of torch how many
                torch.set_num_threads(threads)


def float_kind(tensor: Tensor) -> int:
    return KINDS[tensor.dtype]


def array(tensor: Tensor) -> Any:
    """The tensor's memory as an array of whole numbers, see `BITS_AS`; the kernel is told what they mean."""
    tensor = tensor.detach()
    as_dtype = BITS_AS[tensor.element_size()]
    return (tensor if tensor.dtype == as_dtype else tensor.view(as_dtype)).numpy()


def short(table: Tensor) -> Any:
    """As `array`: a float32 table in bfloat16, half of what is read, where that loses nothing. One copy of a table
    serves all kernels, as long as the table is there."""
    if table not in _short:
        rounded = table.detach().bfloat16()
        _short[table] = array(rounded if torch.equal(rounded.float(), table) else table)
    return _short[table]


def as_int32(tensor: Tensor) -> Any:
    """[..., n] of any dtype -> the same memory as int32 [..., n · itemsize / 4]."""
    return tensor.detach().view(torch.int32).numpy()


def by_head_and_query(sink_logits: Tensor | None, heads: int, group: int) -> Any:
    """[Hkv, G] float32 in units of log 2; -inf of none."""
    if sink_logits is None:
        return _without_sinks(heads, group)
    return (sink_logits.detach().float() * LOG2_E).view(heads, group).numpy()


@lru_cache(maxsize=8)
def _without_sinks(heads: int, group: int) -> Any:
    return np.full((heads, group), -np.inf, np.float32)


def cut(units: int, longest: int, threads: int, least: int, block: int) -> tuple[int, int]:
    """(ranges that each unit's tokens are cut into, tokens of a range), so that threads have equally many ranges.

    Args:
        least: tokens below which a range is not worth its partial result.
        block: ranges have multiples of so many tokens.
    """
    even = threads // math.gcd(units, threads)
    ranges = max(1, min(math.ceil(PER_THREAD * threads / units / even) * even, longest // least))
    return ranges, -(-longest // ranges // block) * block


def nothing(*shape: int, dtype: Any = np.uint8) -> Any:
    """What stands for an operand that a call does not have."""
    return np.empty(shape, dtype)
