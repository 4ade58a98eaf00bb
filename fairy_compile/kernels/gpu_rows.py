"""Which rows of x a launch takes, and by the matrix of which expert it multiplies them.

A launch cuts rows into tiles, one a thread group along a dimension of its grid. Where there is one
matrix, tiles are the rows in turn (`AllRows`). In mixtures of experts a tile has rows of a single
expert, whose matrix is one of several in the same buffer (`Stacked`): those of one token, whose
experts `ChosenRows` reads from the router's answer, or rows sorted by expert, in which every thread
group finds its own by a binary search (`LedRows`, `PackedRows`). So grids depend on the number of
rows alone, which the host knows, and not on what the router chose, which it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tvm.tirx.script import builder as T

from fairy_compile.kernels.gpu_builder import ceildiv, local, store

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer


@dataclass(frozen=True)
class Tile:
    """The rows of x of a thread group.

    Attributes:
        first: the first of them.
        end: the row after the last one; may lie further on than a tile has rows.
        may_be_empty: whether a tile can turn out to have no rows, ``first >= end``.
    """

    first: Any
    end: Any
    may_be_empty: bool = False

    def turns(self, count: int) -> Any:
        """Return the turns of a loop over columns that takes ``count``: none for no rows.

        So barriers around such a loop, and in it, are passed by all threads of a group or by none.
        """
        if not self.may_be_empty:
            return count
        return T.bind(T.if_then_else(self.first < self.end, T.int32(count), T.int32(0)))


class Rows(Protocol):
    """The rows of x of a launch.

    Attributes:
        arguments: see `gpu_builder.launch`.
    """

    arguments: Sequence[Buffer]

    def groups(self, tokens: int) -> Any:
        """Return the number of tiles of up to ``tokens`` rows."""

    def tile(self, group: Expr, tokens: int) -> Tile:
        """Emit what finds a tile and its matrix, and return the tile."""


@dataclass(frozen=True)
class AllRows:
    """``count`` rows and one matrix."""

    count: Any
    arguments: Sequence[Buffer] = ()

    def groups(self, tokens: int) -> Any:
        """See `Rows.groups`."""
        return ceildiv(self.count, tokens)

    def tile(self, group: Expr, tokens: int) -> Tile:
        """See `Rows.tile`."""
        return Tile(group * tokens, self.count)


class Stacked:
    """One of the matrices that lie in a buffer, whose first index is theirs.

    Attributes:
        matrix: which; set by the rows of a launch.
    """

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer
        self.dtype, self.shape = buffer.dtype, buffer.shape[1:]
        self.matrix: Any = None

    def __getitem__(self, index: tuple[Any, ...]) -> Any:
        return self.buffer[(self.matrix, *index)]


class OneRow:
    """A buffer of one row, read as if it were as many as needed."""

    def __init__(self, buffer: Buffer) -> None:
        self.buffer, self.dtype, self.shape = buffer, buffer.dtype, buffer.shape

    def __getitem__(self, index: tuple[Any, ...]) -> Any:
        return self.buffer[(0, *index[1:])]


@dataclass(frozen=True)
class ChosenRows:
    """A row for every choice of one token.

    Attributes:
        ids: int32 (1, rows), the expert of each.
        matrices: of all experts.
    """

    ids: Buffer
    matrices: Sequence[Stacked]
    arguments: Sequence[Buffer] = ()

    def groups(self, tokens: int) -> int:
        """See `Rows.groups`; tiles have one row."""
        return int(self.ids.shape[1])

    def tile(self, group: Expr, tokens: int) -> Tile:
        """See `Rows.tile`."""
        _choose(self.matrices, T.bind(self.ids[0, group]))
        return Tile(group, group + 1)


@dataclass(frozen=True)
class LedRows:
    """Rows sorted by expert, a thread group for every row; few of them.

    The first of every ``tokens`` rows of an expert leads the tile; those of the others do nothing.

    Attributes:
        count: of all rows.
        starts: int32 (experts + 1,); expert e has rows ``starts[e]`` to ``starts[e + 1] - 1``.
        matrices: of all experts.
        arguments: of the function, y last.
    """

    count: Any
    starts: Buffer
    matrices: Sequence[Stacked]
    arguments: Sequence[Buffer]

    def groups(self, tokens: int) -> Any:
        """See `Rows.groups`."""
        return self.count

    def tile(self, group: Expr, tokens: int) -> Tile:
        """See `Rows.tile`."""
        expert = _last_at_most(group, _experts(self.starts), lambda e: self.starts[e])
        _choose(self.matrices, expert)
        end = self.starts[expert + 1]
        if tokens == 1:
            return Tile(group, T.bind(end))
        leads = T.floormod(group - self.starts[expert], tokens) == 0
        return Tile(group, T.bind(T.if_then_else(leads, end, group)), may_be_empty=True)


@dataclass(frozen=True)
class PackedRows:
    """Rows sorted by expert, in little more tiles than they fill; many of them.

    The tiles of expert e are numbered from ``starts[e] // tokens + e`` on. From a to b rows,
    ``b // tokens - a // tokens + 1`` is at least (b - a) / tokens rounded up, so they all come
    before those of expert e + 1. Numbers that nobody needs, at most one an expert and one more, are
    tiles without rows.

    Attributes: see `LedRows`.
    """

    count: Any
    starts: Buffer
    matrices: Sequence[Stacked]
    arguments: Sequence[Buffer]

    def groups(self, tokens: int) -> Any:
        """See `Rows.groups`."""
        return T.floordiv(self.count, tokens) + _experts(self.starts)

    def tile(self, group: Expr, tokens: int) -> Tile:
        """See `Rows.tile`."""

        def number(expert: Expr) -> Expr:
            return T.floordiv(self.starts[expert], tokens) + expert

        expert = _last_at_most(group, _experts(self.starts), number)
        _choose(self.matrices, expert)
        first = T.bind(self.starts[expert] + (group - number(expert)) * tokens)
        return Tile(first, T.bind(self.starts[expert + 1]), may_be_empty=True)


def _experts(starts: Buffer) -> int:
    return int(starts.shape[0]) - 1


def _choose(matrices: Sequence[Stacked], expert: Expr) -> None:
    for stacked in matrices:
        stacked.matrix = expert


def _last_at_most(limit: Expr, count: int, key: Callable[[Expr], Expr]) -> Expr:
    """Return the last i below ``count`` with key(i) <= limit; keys ascend, and the first does."""
    # A register: as nested expressions, TVM's simplifier would take exponential time for it. So
    # launches need their `Rows.arguments`.
    found = local((1,), "int32")
    store(found, 0, T.int32(0))
    step = 1 << (count - 1).bit_length() >> 1
    while step:
        further = T.bind(found[0] + step)
        reached = T.And(further < count, key(T.min(further, count - 1)) <= limit)
        store(found, 0, T.if_then_else(reached, further, found[0]))
        step //= 2
    return T.bind(found[0])
