"""The kernels for a GPU, called with tensors: two launches, cut from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attend.launch import units_tile
from ..attend.shapes import multiprocessors
from ..backend import device_of, interpreting
from ..codes import OFFSET
from ..pages import PAGE
from ..pages.table import capacity_of
from .operands import Budget, Place, Tables, Tokens
from .prepare_kernel import prepare_kernel
from .range_kernel import range_kernel
from .tile import order_of

LOG2_E = 1.4426950408889634
TILE = 128
"""Tokens that a program takes at a time; half as many where more would not fit into registers."""
SMALLEST = 512
"""Tokens that a partial result should stand for."""
SAMPLE_TILE, SAMPLE_WARPS = 256, 8
"""Tokens of the sample that are scored at a time: one program scores all of them, and waits for each tile."""
GATHERED_BYTES = 8192
"""Bytes of keys that are gathered at a time, and of values."""
PARTS = 8
"""Partial results that are joined at a time."""
REGISTERS = 255
"""Of a thread, all that there are. Left to itself the assembler spills some where it need not."""


def scan(
    query: Tensor, tokens: Tokens, tables: Tables, budget: Budget, *, table: Tensor | None, bits: int | None,
    select: str, residual: bool, scaling: float, softcap: float | None, sink_logits: Tensor | None, marked: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """See `kvcal.kernels.scan.scan`; the operands are checked."""
    paged = table is not None
    call = Call(query.contiguous(), tokens, tables, bits, select, residual, softcap is not None, paged)
    factor, cap = scaling * LOG2_E, (softcap or 1.0) * LOG2_E
    (batch, heads, group, _), values, longest = query.shape, tokens.value.shape[-1], budget.longest
    units, none = batch * heads, call.query  # `none` is in place of what a kernel does not read
    key, value = (none if part is None else part for part in (call.words("key"), call.words("value")))
    held = {name: none if part is None else part for name, part in vars(tokens).items()}
    reduced = tokens.reduced if bits is None else tokens.reduced.view(torch.int32)
    place, of_table = call.place(tokens.key), none
    pages = 0
    if table is not None:
        of_table, pages = table, table.stride(0)

    projected, sums = call.scratch(units, call.rank_tile, call.columns, dtype=call.kind), call.per_column(units)
    by_word = call.scratch(units, call.words_tile, call.columns)
    turned = torch.empty_like(call.query, dtype=call.kind) if call.coded else call.query
    base, threshold, arrivals = call.per_column(units), call.per_column(units), call.scratch(units, dtype=torch.int32)
    out = torch.empty(batch, heads, group, values, dtype=query.dtype, device=query.device)
    sample = max(call.sample_tile, triton.next_power_of_2(budget.sampled))
    with device_of(query):
        prepare_kernel[(heads, batch)](
            call.query, call.query_map, key, tables.turn_key if call.coded else none,
            reduced, held["scale"], held["codeword"], of_table,
            budget.lengths, budget.first, budget.begin, budget.stride, budget.rank,
            projected, sums, by_word, turned, call.scratch(units, group, sample), base, threshold, arrivals, out,
            factor, cap, call.offset, pages, place.sequence, place.head,
            OF_TOKEN=place.token, **call.constants, DV=values, SAMPLE=sample, TILE=call.sample_tile,
            num_warps=SAMPLE_WARPS, maxnreg=REGISTERS,
        )  # fmt: skip

    fitting = call.at_once * multiprocessors(query.device) // units
    splits = max(1, min(fitting, triton.cdiv(longest, SMALLEST)))
    parts = batch * splits + batch - 1  # see `attend.split`
    capacity = triton.cdiv(longest, TILE) * TILE
    programs, own_marks = heads * parts, select == "head"
    shape = batch, heads, group if own_marks else 1, longest
    read = torch.zeros(shape, dtype=torch.uint8, device=query.device) if marked else None
    correction = Place(0, 0, 1) if tokens.correction is None else call.place(tokens.correction)
    with device_of(query):
        range_kernel[(parts, heads)](
            turned, tokens.key, tokens.value, reduced, held["scale"], held["codeword"], held["key_scale"],
            held["value_scale"], held["correction"], held["correction_scale"], of_table,
            value, tables.turn_value if call.coded else none,
            budget.lengths, budget.first, budget.begin, none if sink_logits is None else sink_logits.contiguous(),
            projected, sums, by_word, base, threshold, arrivals,
            call.scratch(units, capacity, dtype=torch.int32),
            call.scratch(units, capacity if own_marks else 0, dtype=torch.int32),
            call.scratch(units, capacity // PAGE if call.corrected else 0, call.columns), call.per_column(programs),
            call.scratch(programs, call.words_tile if residual else 0, call.columns),
            call.scratch(programs, group, values), call.scratch(programs, group if call.coded else 0, values),
            call.scratch(programs, group), out if read is None else read, out,
            factor, cap, longest, batch, splits, capacity, pages, place.sequence, place.head,
            capacity_of(tokens.key, table) // PAGE, correction.sequence, correction.head,
            OF_TOKEN=place.token, OF_PAGE=correction.token, KEY_PITCH=call.pitch(tokens.key),
            VALUE_PITCH=call.pitch(tokens.value), **call.constants, DV=values, DV_TILE=power_of_two(values),
            LOW=min(32, call.words_tile // 2), RESIDUAL=residual, CORRECTED=call.corrected,
            SINK_LOGITS=sink_logits is not None, MARKED=marked, UNITS=units_tile(batch),
            TILE=call.tile, GATHERED=call.gathered, PARTS=PARTS, STAGES=3 if call.kind.itemsize == 2 else 2,
            WEIGHT=of_triton(call.weight), num_warps=call.warps, maxnreg=REGISTERS,
        )  # fmt: skip
    return out, None if read is None else read.view(torch.bool)


@dataclass(frozen=True, eq=False)
class Call:
    """The operands of a call, and the sizes that follow from them."""

    query: Tensor
    tokens: Tokens
    tables: Tables
    bits: int | None
    select: str
    residual: bool
    capped: bool
    paged: bool

    @cached_property
    def kind(self) -> torch.dtype:
        """What is multiplied."""
        return kinds(self.query)[0]

    @cached_property
    def weight(self) -> torch.dtype:
        """Likewise of weights that are relative to a base, and may be large."""
        return kinds(self.query)[1]

    @property
    def coded(self) -> bool:
        """Whether rows are 8-bit codes."""
        return self.tokens.key.dtype == torch.uint8

    @property
    def corrected(self) -> bool:
        return self.residual and self.tokens.correction is not None

    @cached_property
    def columns(self) -> int:
        return max(8, triton.next_power_of_2(self.query.shape[2]))

    @property
    def warps(self) -> int:
        """Of a program, so many that nothing is spilled."""
        return 4 if self.columns == 8 and self.kind.itemsize == 2 else 8

    @property
    def at_once(self) -> int:
        """Programs that fit onto a multiprocessor: more would be a second round, of more partial results."""
        return 8 // self.warps

    @property
    def tile(self) -> int:
        return TILE if self.columns == 8 and self.kind.itemsize == 2 else TILE // 2

    @property
    def sample_tile(self) -> int:
        return SAMPLE_TILE if self.kind.itemsize == 2 else SAMPLE_TILE // 4

    @property
    def stored(self) -> int:
        """Words of a token's code, or numbers of its reduced key."""
        rank = self.tables.query_map.shape[-1]
        return rank if self.bits is None else rank * self.bits // 32

    @cached_property
    def stored_tile(self) -> int:
        return max(16 if self.bits is None else self.bits // 2, triton.next_power_of_2(self.stored))

    @property
    def rank_tile(self) -> int:
        return self.stored_tile if self.bits is None else self.stored_tile * 32 // self.bits

    @property
    def codewords(self) -> int:
        return 0 if self.tables.key is None else self.tables.key.shape[1]

    @cached_property
    def words_tile(self) -> int:
        return max(32, triton.next_power_of_2(self.codewords))

    @property
    def gathered(self) -> int:
        width = max(self.query.shape[-1], self.tokens.value.shape[-1])
        return max(16, min(64, GATHERED_BYTES // (width * self.query.element_size())))

    @property
    def offset(self) -> float:
        """By how much `tile.levels` are above what they stand for."""
        return 0.0 if self.bits is None else OFFSET[self.bits] + over(self.bits, self.kind)

    @cached_property
    def constants(self) -> dict[str, Any]:
        """What both kernels are compiled for."""
        width, pitch = self.query.shape[-1], self.pitch(self.tokens.reduced)
        pitch = pitch if self.bits is None else pitch // 4  # of bytes, words
        return {
            "PAGED": self.paged, "PAGE": PAGE, "GROUP": self.query.shape[2], "COLUMNS": self.columns,
            "D": width, "D_TILE": power_of_two(width), "BITS": self.bits or 16, "WIDTH": self.stored,
            "WIDTH_TILE": self.stored_tile, "PITCH": pitch, "RANK_TILE": self.rank_tile, "WORDS": self.codewords,
            "WORDS_TILE": self.words_tile, "CODED": self.coded, "SELECT": self.select, "CAPPED": self.capped,
            "DTYPE": of_triton(self.kind),
        }  # fmt: skip

    @property
    def query_map(self) -> Tensor:
        """[Hkv, D, rank of a tile]: columns in the order of `tile.levels`, zeros where the tile is filled up."""

        def make() -> Tensor:
            given, rank = self.tables.query_map, self.tables.query_map.shape[-1]
            order = range(self.stored_tile) if self.bits is None else order_of(self.bits, rank, self.stored_tile)
            columns = [rank if dim is None or dim >= rank else dim for dim in order]
            return torch.nn.functional.pad(given, (0, 1))[..., columns].to(self.kind).contiguous()

        return self.tables.prepared(("query_map", self.kind, self.bits), make)

    def words(self, name: str) -> Tensor | None:
        """Codewords' keys or values, as they are multiplied."""
        table, dtype = getattr(self.tables, name), self.kind if name == "key" else self.weight
        if table is None:
            return None
        return self.tables.prepared((name, dtype), partial(table.to, dtype))

    def pitch(self, part: Tensor) -> int:
        """Numbers from one token to the next."""
        return part.stride(2) if self.paged else part.shape[3]

    def place(self, part: Tensor) -> Place:
        """With pages in multiples of `ALIGNED` bytes."""
        if not self.paged:
            return Place.of(part)
        assert self.tokens.pieces is not None
        return Place(*self.tokens.pieces, 1)

    def scratch(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.query.device)

    def per_column(self, count: int) -> Tensor:
        return self.scratch(count, self.columns)


def kinds(query: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """(`Call.kind`, `Call.weight`). float16 would overflow where a token weighs more than the sample; and Triton's
    interpreter cannot reckon in bfloat16."""
    if interpreting() or query.dtype == torch.float32:
        return torch.float32, torch.float32
    return query.dtype, torch.bfloat16


def over(bits: int, dtype: torch.dtype) -> float:
    """By how much numbers of `tile.levels` are larger than what is stored."""
    if dtype == torch.float16:
        return 1024.0
    return 128.0 if dtype == torch.bfloat16 and bits < 8 else 0.0


def power_of_two(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def of_triton(dtype: torch.dtype) -> Any:
    return getattr(tl, str(dtype).removeprefix("torch."))
