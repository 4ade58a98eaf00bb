"""TIR that decodes the codes of a row tile to panels: their real 2 x 2 blocks, as integers.

With many tokens a row tile's codes are decoded once, a block of columns at a time, into L1. See
`x86_panel_layout` for what a panel holds. There are four, one for each way from x to y:

    panel    0               1               2               3
    meets    Re x            Re x            Im x            Im x
    gives    Re y            Im y            Re y            Im y
    entries  Re U + Re W     Im U + Im W     Im W - Im U     Re U - Re W

A panel is a row of vectors, one or two for each column block (4 columns) of the row tile:

- bytes, ``entries[4 * row + column]``: as codes lie, what vpdpbusd, pmaddubsw and AMX multiply. For
  all but AMX they are unsigned, with `Isa.panel_offset` added.
- int16 in mode ``words``, two vectors with ``[4 * row + column]`` of half the rows each. AVX2 keeps
  lanes of 16 bytes apart, so the first has rows 0, 1 and 4, 5 of a tile of 8 and the second 2, 3
  and 6, 7: what unpacking makes of look-ups, and what adding neighbours puts back in order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvm.tirx.script import builder as T

from fairy_compile.kernels.x86_activations import DIGITS, span, store
from fairy_compile.kernels.x86_layout import BLOCK
from fairy_compile.kernels.x86_panel_layout import Panel, TableMode, panels
from fairy_compile.kernels.x86_tables import blocks_per_step, joint_offset, nibbles
from fairy_compile.op import ACT_GROUP, PhaseSpec
from fairy_compile.phase.tensor import TILE as SCALE_TILE

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer

    from fairy_compile.kernels.x86 import Isa
    from fairy_compile.kernels.x86_codegen import CodebookFunction

PANELS = 4
_AXES = ((1, 0, -1, 0), (0, 1, 0, -1))  # re and im of the codes
_LANE = 16  # bytes that AVX2 shuffles keep apart


@dataclass(frozen=True)
class _Table:
    """What a table sums: a term's (stage, place of its code in the nibble)."""

    term: int
    stages: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Lookup:
    """Where a look-up's index is, in bits of a plane, and its table."""

    plane: int
    shift: int
    table: _Table


class Panels:
    """Emits the decoding of one call's weights, and gives their scales.

    Args:
        spec: the call.
        isa: instruction set: vector width, shuffle, and form of the entries.
        arrays: those of `PanelLayout`.
        mode: what a panel holds.
        columns: columns to decode at a time, a multiple of 128.
        prefetch: emits the prefetch of codes that are ahead of (row tile, step), or None.

    Attributes:
        flush: columns between two changes of scale, 64 or 128.
        flushes: of all columns.
        block_flushes: flushes that are decoded at a time.
        vectors: vectors of a column block.
        offset: what is added to entries.
        sets: the `Panel` sets that are decoded one after the other.
        buffer: (panel, element), set by `allocate`.
    """

    def __init__(
        self,
        spec: PhaseSpec,
        isa: Isa,
        arrays: dict[str, Buffer],
        mode: TableMode,
        columns: int,
        prefetch: Callable[[Expr, Expr], None] | None = None,
    ) -> None:
        self._prefetch = prefetch
        self.spec, self.isa, self.arrays, self.mode = spec, isa, arrays, mode
        self.flush = SCALE_TILE if spec.scale == "tile64" else ACT_GROUP
        self.flushes = -(-spec.m // ACT_GROUP) * ACT_GROUP // self.flush
        self.block_flushes = columns // self.flush
        self.flush_blocks = self.flush // BLOCK
        self.words = mode == "words"
        self.vectors = 2 if self.words else 1
        self.lanes = isa.width // self.vectors  # entries of a vector
        self.offset = 0 if self.words else isa.panel_offset
        self.sets = panels(len(spec.terms), spec.stages, mode)
        self._step_blocks = blocks_per_step(len(spec.terms), spec.stages)
        self._by_row = spec.scale == "row"
        self._places = {
            (code.term, code.stage, code.block): (i, slot)
            for i, pair in enumerate(nibbles(len(spec.terms), spec.stages))
            for slot, code in enumerate(pair)
        }

    def allocate(self) -> None:
        """Emit the buffer of the panels; inside the loop over row tiles."""
        size = self.block_flushes * self.flush * self.isa.rows
        self.buffer = T.alloc_buffer((PANELS, size), "int16" if self.words else "int8")

    def at(self, flush: Expr, block: Expr | int, vector: int = 0) -> Expr:
        """Return the element of a panel where a vector begins.

        Args:
            flush: counted from the first one decoded.
            block: column block of the flush.
            vector: 0 or 1, of the column block.
        """
        return ((flush * self.flush_blocks + block) * self.vectors + vector) * self.lanes

    def decode(self, tile: Expr, panel: Panel, first: Expr, count: Expr) -> None:
        """Fill the panels with the flushes [first, first + count) of a row tile."""
        width = self.isa.width
        lookups = [self._lookups(panel, block) for block in range(self._step_blocks)]
        keys = dict.fromkeys(
            (look.table, axis, byte)
            for of_block in lookups
            for look in of_block
            for axis in (0, 1)
            for byte in range(self.vectors)
        )
        tables = {key: T.alloc_buffer((width,), "int8") for key in keys}
        flush_steps = self.flush_blocks // self._step_blocks
        with T.serial(0, count) as i:
            for key, buffer in tables.items():
                store(buffer, span(0, width), self._entries(tile, first + i, *key))
            loaded = {key: T.bind(table[span(0, width)]) for key, table in tables.items()}
            with T.serial(0, flush_steps) as s:
                step = T.bind((first + i) * flush_steps + s)
                if self._prefetch and panel is self.sets[0]:
                    self._prefetch(tile, step)
                for block, of_block in enumerate(lookups):
                    entries = self._look_up(tile, step, of_block, loaded)
                    for vector, four in enumerate(entries):
                        at = T.bind(self.at(i, s * self._step_blocks + block, vector))
                        for number, entry in enumerate(four):
                            store(self.buffer, (number, span(at, self.lanes)), entry)

    def decode_all(self, tile: Expr, use: Callable[[Panel, Expr, Expr], None]) -> None:
        """Decode a row tile, block after block, set after set; ``use`` gets what `decode` did."""
        with T.serial(0, -(-self.flushes // self.block_flushes)) as i:
            first = T.bind(i * self.block_flushes)
            count = T.bind(T.min(self.block_flushes, self.flushes - first))
            for panel in self.sets:
                self.decode(tile, panel, first, count)
                use(panel, first, count)

    def _lookups(self, panel: Panel, block: int) -> list[_Lookup]:
        """Return the look-ups of a column block of a step: of codes, or of nibbles of two."""
        found: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
        for term, stage in panel.codes:
            nibble, slot = self._places[term, stage, block]
            if self._by_row:
                found[nibble, slot, term] = [(stage, 0)]
            else:
                found.setdefault((nibble, 0, term), []).append((stage, slot))
        return [
            _Lookup(nibble // 2, 4 * (nibble % 2) + 2 * slot, _Table(term, tuple(stages)))
            for (nibble, slot, term), stages in found.items()
        ]

    def _look_up(
        self, tile: Expr, step: Expr, lookups: list[_Lookup], tables: dict[Any, Expr]
    ) -> list[list[Expr]]:
        """Return [vector][panel] of a column block."""
        isa, kind = self.isa, f"int8x{self.isa.width}"
        places = dict.fromkeys((look.plane, look.shift) for look in lookups)
        indices = {place: self._index(tile, step, *place) for place in places}
        sums: dict[tuple[str, int], list[Expr]] = {}
        for look in lookups:
            index = indices[look.plane, look.shift]
            for axis in (0, 1):
                found = [
                    T.call_llvm_pure_intrin(
                        kind, isa.shuffle, tables[look.table, axis, byte], index
                    )
                    for byte in range(self.vectors)
                ]
                entries = self._unpack(found) if self.words else found
                key = (self.spec.terms[look.table.term], axis)
                known = sums.get(key)
                sums[key] = entries if known is None else _each(_add, known, entries)
        no = [None] * self.vectors
        re_u, im_u, re_w, im_w = (sums.get((term, axis), no) for term in "UW" for axis in (0, 1))
        four = [
            _each(_add, re_u, re_w),
            _each(_add, im_u, im_w),
            _each(self._subtract, im_w, im_u),
            _each(self._subtract, re_u, re_w),
        ]
        if self.offset:  # bytes wrap around, so 128 may as well be taken off
            offset = T.broadcast(T.int8((self.offset + 128) % 256 - 128), isa.width)
            four = [[entry + offset for entry in entries] for entries in four]
        return [list(vector) for vector in zip(*four, strict=True)]

    def _index(self, tile: Expr, step: Expr, plane: int, shift: int) -> Expr:
        """Return the shuffle's index vector for a nibble, or (row, code) with scales of rows.

        vpermb looks 64 entries up, which are those of 16 rows, and pshufb 16 in each lane, for the
        4 rows that the lane holds.
        """
        isa, width = self.isa, self.isa.width
        codes = self.arrays["codes"][tile, step, plane, span(0, width)]
        words = T.reinterpret(f"int32x{isa.rows}", codes)
        if shift:  # bits that come from the next byte are cut off below
            words = T.shift_right(words, T.broadcast(T.int32(shift), isa.rows))
        bits = T.broadcast(T.int8(3 if self._by_row else 15), width)
        index = T.bitwise_and(T.reinterpret(f"int8x{width}", words), bits)
        if self._by_row:
            rows_apart = _LANE // BLOCK if isa.masked_index else isa.rows
            byte_of_row = [4 * (i // BLOCK % rows_apart) for i in range(width)]
            row = T.Shuffle([T.int8(v) for v in byte_of_row], list(range(width)))
            index = T.bitwise_or(index, row)
        return T.bind(index)

    def _subtract(self, a: Expr | None, b: Expr | None) -> Expr | None:
        """Return a - b, None being zero."""
        if a is None:
            a = T.broadcast(T.int16(0) if self.words else T.int8(0), self.lanes)
        return a if b is None else a - b

    def _unpack(self, two: list[Expr]) -> list[Expr]:
        """Return int16 vectors of the low and high bytes of entries."""
        low, high = (T.bind(v) for v in two)
        half, width = _LANE // 2, self.isa.width
        vectors = []
        for first in (0, half):
            order = [
                byte + from_high
                for lane in range(0, width, _LANE)
                for byte in range(lane + first, lane + first + half)
                for from_high in (0, width)
            ]
            vectors.append(T.reinterpret(f"int16x{self.lanes}", T.Shuffle([low, high], order)))
        return vectors

    def _entries(self, tile: Expr, flush: Expr, table: _Table, axis: int, byte: int) -> Expr:
        """Return a byte of the entries of a table, over a vector.

        With weight p the codes 0 .. 3 are p, 0, -p, 0 on the real axis and 0, p, 0, -p on the
        imaginary one.
        """
        if self._by_row:
            ((stage, _),) = table.stages
            weight = T.bind(self._weight(tile, flush, table.term, stage, axis))
            return self._entries_of_rows(weight, axis, byte)
        total: Expr | None = None
        for stage, slot in table.stages:
            weight = T.bind(self._weight(tile, flush, table.term, stage, axis))
            signs = [T.int32(_AXES[axis][nibble >> 2 * slot & 3]) for nibble in range(16)]
            term = T.broadcast(weight, 16) * T.Shuffle(signs, list(range(16)))
            total = _add(total, term)
        if byte:
            total = T.shift_right(total, T.broadcast(T.int32(8 * byte), 16))
        entries = T.bind(T.cast(total, "int8x16"))  # keeps the low byte
        width = self.isa.width
        return T.Shuffle([entries] * (width // 16), list(range(width)))

    def _entries_of_rows(self, weight: Expr, axis: int, byte: int) -> Expr:
        """Return a byte of the entries of the four codes, for each row."""
        rows = self.isa.rows

        def cut(value: Expr) -> Expr:
            if byte:
                value = T.shift_right(value, T.broadcast(T.int32(8 * byte), rows))
            return T.bitwise_and(value, T.broadcast(T.int32(255), rows))

        if self.mode == "split":
            weight = T.broadcast(weight, rows)
        negative = cut(T.broadcast(T.int32(0), rows) - weight)
        word = T.bitwise_or(cut(weight), T.shift_left(negative, T.broadcast(T.int32(16), rows)))
        if axis:
            word = T.shift_left(word, T.broadcast(T.int32(8), rows))
        return T.reinterpret(f"int8x{self.isa.width}", word)

    def _weight(self, tile: Expr, flush: Expr, term: int, stage: int, axis: int) -> Expr:
        """Return the integer that a code's axis stands for, or those of rows with their own."""
        stages = self.spec.stages
        if self.mode in ("combined", "words"):
            weights = self.arrays[f"{self.mode}_weights"]
            unit = (term * stages + stage) * 2 + axis
            if self._by_row:
                rows = self.isa.rows
                return T.cast(weights[tile, 0, unit, span(0, rows)], f"int32x{rows}")
            return T.cast(weights[tile, self._column_tile(flush), unit], "int32")
        if self.mode == "split" or stage == stages // 2 * 2:
            return T.int32(1)
        # A joint table's entry where the other code of the nibble has nothing on this axis.
        unit = (term * (stages // 2) + stage // 2) * 2 + axis
        alone = 4 if (stage % 2 == 0) == (axis == 0) else 1
        entry = T.cast(self.arrays["joint_tables"][tile, unit, alone], "int32")
        return entry - joint_offset(self.isa.joint_limit)

    def scales(self, tile: Expr, panel: Panel, flush: Expr) -> list[Expr]:
        """Return the scale of each row for the real and the imaginary axis of weights.

        Real weights take Re x to Re y and Im x to Im y, imaginary ones the others.
        """
        scales = self.arrays["scales" if self.mode == "split" else f"{self.mode}_scales"]
        rows, found = self.isa.rows, []
        for unit in (panel.scale, panel.scale + 1):
            if self._by_row:
                found.append(T.bind(scales[tile, 0, unit, span(0, rows)]))
            else:
                scale = scales[tile, self._column_tile(flush), unit]
                found.append(T.bind(T.broadcast(scale, rows)))
        return found

    def _column_tile(self, flush: Expr) -> Expr | int:
        return flush if self.spec.scale == "tile64" else 0


def _each(combine: Any, first: list[Any], second: list[Any]) -> list[Any]:
    return [combine(a, b) for a, b in zip(first, second, strict=True)]


def _add(a: Expr | None, b: Expr | None) -> Expr | None:
    """Return a + b, None being zero."""
    return b if a is None else a if b is None else a + b


class PanelMultiply(ABC):
    """Emits the multiplication of all rows of x by one call's weights; a `WideMultiply`.

    Args:
        function: gives the call, its instruction set and its arguments.
        mode: what a panel holds.
        columns: columns to decode at a time, a multiple of 128.

    Attributes:
        spec: the call.
        isa: instruction set.
        x: float32 (b, 2m).
        arrays: those of `PanelLayout`.
        y: float32 (b, 2n).
        rows: of x.
        digits: of an activation.
        panels: of the weights.
        mode: as given.
    """

    def __init__(self, function: CodebookFunction, *, mode: TableMode, columns: int) -> None:
        self.spec, self.isa, self.mode = function.spec, function.isa, mode
        self.x, self.arrays, self.y = function.x, function.arrays, function.y
        self.rows, self.digits = self.x.shape[0], DIGITS[self.spec.act]
        # Only AMX is so quick that it waits for codes: 1.6 times as long at 16 rows, 1.3 at 32.
        prefetch = function.prefetch_codes if self.isa.amx else None
        self.panels = Panels(self.spec, self.isa, self.arrays, mode, columns, prefetch)

    @abstractmethod
    def usable(self) -> Expr:
        """See `WideMultiply`."""

    @abstractmethod
    def emit(self) -> None:
        """See `WideMultiply`."""
