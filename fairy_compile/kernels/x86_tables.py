"""Codebooks of the x86 kernels: which nibble looks up which table for which sum.

A table has 16 entries, one for each value ``c0 | c1 << 2`` of a nibble of two codes. Entries are
signed weights plus an offset that makes them unsigned, as x86's byte dot products want one side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from fairy_compile.config import Term
from fairy_compile.phase import PhaseTensor

BLOCK = 4
SPLIT_OFFSET = 1

_RE = np.array([1, 0, -1, 0], np.int8)
_IM = np.array([0, 1, 0, -1], np.int8)


@dataclass(frozen=True)
class Code:
    """One two-bit code of a step: indices of its term and stage, and its column block."""

    term: int
    stage: int
    block: int


@cache
def nibbles(terms: int, stages: int) -> tuple[tuple[Code, Code], ...]:
    """Return the codes (low, high two bits) of each nibble of a step; nibble i is in plane i // 2.

    Stages are paired; the last of an odd number of stages pairs with the other term of the same
    block, or with the next block where there is one term.
    """
    paired = [
        (Code(term, stage, block), Code(term, stage + 1, block))
        for term in range(terms)
        for stage in range(0, stages - 1, 2)
        for block in range(blocks_per_step(terms, stages))
    ]
    if stages % 2 == 0:
        return tuple(paired)
    last = [
        Code(term, stages - 1, block)
        for block in range(blocks_per_step(terms, stages))
        for term in range(terms)
    ]
    return (*paired, *zip(last[::2], last[1::2], strict=True))


def blocks_per_step(terms: int, stages: int) -> int:
    """Return the column blocks of a step: 1, 2 or 4."""
    return 4 // math.gcd(4, terms * stages)


@dataclass(frozen=True)
class Product:
    """A sum of table entries times activations, and where it goes.

    Attributes:
        half: 0 for the real, 1 for the imaginary part of x.
        output: 0 for the real, 1 for the imaginary part of y.
        negative: it is subtracted.
    """

    half: int
    output: int
    negative: bool = False


@dataclass(frozen=True)
class Unit:
    """Integer sums the kernel keeps that share tables and a scale.

    Its index in its `Codebook` is also that of its scale in the packed scales of the mode.

    Attributes:
        term: "U" or "W"; "UW" where tables hold the sum of both.
        axis: 0 for the real, 1 for the imaginary part of the weight.
        joint: its tables hold two codes; else one.
        products: one sum for each.
    """

    term: Literal["U", "W", "UW"]
    axis: int
    joint: bool
    products: tuple[Product, ...]


def _term_unit(term: Term, axis: int, joint: bool) -> Unit:
    """Return a term's unit: U x = (R a - I b, R b + I a), W conj x = (R a + I b, I a - R b)."""
    minus = axis == (1 if term == "U" else 0)
    products = (Product(0, axis), Product(1, 1 - axis, minus))
    return Unit(term, axis, joint, products)


@dataclass(frozen=True)
class Lookup:
    """One table look-up of a step.

    Attributes:
        nibble: index into `nibbles`.
        block: column block of the step whose activations it meets.
        table: index into the packed ``tables``, or those of the codebook where its unit is joint.
        unit: index of the unit it adds to.
    """

    nibble: int
    block: int
    table: int
    unit: int


@dataclass(frozen=True)
class Entry:
    """What is multiplied into one unit's sums: a look-up, or the sum or difference of two.

    Attributes:
        unit: index of the unit.
        block: column block of the step whose activations it meets.
        lookups: indices of one or two look-ups.
        minus: the second one is subtracted.
    """

    unit: int
    block: int
    lookups: tuple[int, ...]
    minus: bool = False


@dataclass(frozen=True)
class Codebook:
    """How a step becomes sums: the units, and the entries made of look-ups that feed them.

    ``tables`` names the packed arrays that look-ups of joint units and the units' scales are in.
    """

    units: tuple[Unit, ...]
    lookups: tuple[Lookup, ...]
    entries: tuple[Entry, ...]
    tables: Literal["joint", "combined", "split"]


@cache
def split_codebook(terms: tuple[Term, ...], stages: int) -> Codebook:
    """Return one unit per (term, stage, axis): tables of -1, 0, 1, exact for any scales."""
    units = [
        _term_unit(term, axis, False) for term in terms for _ in range(stages) for axis in (0, 1)
    ]
    lookups = tuple(
        Lookup(i, code.block, 2 * slot + axis, (code.term * stages + code.stage) * 2 + axis)
        for i, pair in enumerate(nibbles(len(terms), stages))
        for slot, code in enumerate(pair)
        for axis in (0, 1)
    )
    return Codebook(tuple(units), lookups, _alone(lookups), "split")


def _alone(lookups: Sequence[Lookup]) -> tuple[Entry, ...]:
    return tuple(Entry(look.unit, look.block, (i,)) for i, look in enumerate(lookups))


@cache
def joint_codebook(terms: tuple[Term, ...], stages: int) -> Codebook:
    """Return one unit per (term, pair of stages, axis), and split ones for an odd last stage."""
    pairs = stages // 2
    units = [
        _term_unit(term, axis, True) for term in terms for _ in range(pairs) for axis in (0, 1)
    ]
    joint_units = len(units)
    if stages % 2:
        units += [_term_unit(term, axis, False) for term in terms for axis in (0, 1)]
    lookups = []
    for i, (low, high) in enumerate(nibbles(len(terms), stages)):
        for axis in (0, 1):
            if low.stage != high.stage:
                unit = (low.term * pairs + low.stage // 2) * 2 + axis
                lookups.append(Lookup(i, low.block, unit, unit))
                continue
            for slot, code in enumerate((low, high)):
                unit = joint_units + 2 * code.term + axis
                lookups.append(Lookup(i, code.block, 2 * slot + axis, unit))
    return Codebook(tuple(units), tuple(lookups), _alone(lookups), "joint")


@cache
def pair_codebook() -> Codebook:
    """Return the codebook of joint tables of U and W, for one stage.

    A nibble holds the codes of U and W at one place, so that one look-up gives an entry of the real
    2 x 2 block [[Re U + Re W, Im W - Im U], [Im U + Im W, Re U - Re W]], which meets one half of x:
    half of the dot products of `split_codebook`. Tables are in the order of `pair_arrays`.
    """
    products = ((0, Product(0, 0)), (0, Product(1, 1)), (1, Product(0, 1)), (1, Product(1, 0)))
    units = tuple(Unit("UW", axis, True, (product,)) for axis, product in products)
    lookups = tuple(
        Lookup(i, low.block, unit, unit)
        for i, (low, _) in enumerate(nibbles(2, 1))
        for unit in range(len(units))
    )
    return Codebook(units, lookups, _alone(lookups), "joint")


@cache
def combined_codebook() -> Codebook:
    """Return the codebook of combined tables, for U and W of two stages.

    The nibbles of U and W each look up both axes, and their sums and differences are entries of the
    real 2 x 2 block, which meet one half of x each: half of the dot products of `joint_codebook`,
    for scales of an axis that share a unit. U's tables have the offset that makes entries unsigned,
    so the upper right one, Im W - Im U, is had as Im U - Im W and subtracted.
    """
    units = tuple(
        Unit("UW", axis, True, (product,))
        for axis, product in (
            (0, Product(0, 0)),
            (0, Product(1, 1)),
            (1, Product(0, 1)),
            (1, Product(1, 0, negative=True)),
        )
    )
    # Nibbles are (u1 u2), (w1 w2); tables those of `combined_arrays`: Re U, Im U, Re W, Im W.
    lookups = tuple(
        Lookup(term, 0, 2 * term + axis, 2 * axis) for term in (0, 1) for axis in (0, 1)
    )
    entries = tuple(
        Entry(unit, 0, (unit // 2, 2 + unit // 2), minus=bool(unit % 2)) for unit in range(4)
    )
    return Codebook(units, lookups, entries, "combined")


def split_tables() -> np.ndarray:
    """Return uint8 (4, 16): tables 2 * slot + axis of the nibble ``c0 | c1 << 2``, 1 added."""
    index = np.arange(16)
    tables = [part[index >> shift & 3] for shift in (0, 2) for part in (_RE, _IM)]
    return (np.stack(tables) + SPLIT_OFFSET).astype(np.uint8)


@cache
def _coprime_pairs(limit: int) -> np.ndarray:
    """Return the pairs (p, q) of coprime p, q >= 0 with p + q <= limit, as int64 (pairs, 2)."""
    p, q = np.mgrid[0 : limit + 1, 0 : limit + 1]
    keep = (p + q <= limit) & (np.gcd(p, q) == 1)
    return np.stack([p[keep], q[keep]], axis=1)


def joint_ratio(first: float, second: float, limit: int) -> tuple[int, int, float]:
    """Return (p, q, error): the integer ratio p:q nearest in direction to ``first : second``.

    The stages' scales (s1, s2) are replaced by s * (p, q) with the least-squares s, so the vector
    of scales moves by ``error * |(s1, s2)|``, where error is the sine of the angle between (s1, s2)
    and (p, q). No entry of a weight moves by more than sqrt(2) times that.

    Bound: with p + q <= L, directions of neighbouring fractions (p, q), (p', q') have
    p q' - q p' = 1, so the sine of the angle between them is 1 / (|(p, q)| |(p', q')|). It is
    largest beside an axis, (1, 0) and (L - 1, 1), where it is below 1 / (L - 1); half of that angle
    is the worst case: **error < 1 / (2 (L - 1))**, 4.0e-3 for L = 127 and 8.1e-3 for L = 63. It is
    reached only where s1 / s2 is very near, but not at, a ratio of small integers or an axis; the
    usual error is ten times smaller.
    """
    pairs = _coprime_pairs(limit)
    # float64 holds the products exactly enough: the sines compared differ by 1e-5 and more.
    norm = np.hypot(pairs[:, 0], pairs[:, 1]) * math.hypot(first, second)
    sines = np.abs(first * pairs[:, 1] - second * pairs[:, 0]) / norm
    best = int(sines.argmin())
    return int(pairs[best, 0]), int(pairs[best, 1]), float(sines[best])


def joint_ratio_error(parts: Sequence[PhaseTensor], limit: int) -> float:
    """Return the largest `joint_ratio` error of any pair of codes that share tables.

    A compiler that wants table mode ``joint`` only where it is as good as exact compares this with
    a threshold, say 1e-3, and builds with ``split`` above it. Pairs are stages, or U and W of a
    single stage. It is 0 where there are none, and infinite where scales are not per tensor (there
    is no joint mode then).
    """
    if any(part.scale != "tensor" for part in parts):
        return math.inf
    return max(
        (joint_ratio(*pair, limit)[2] for part in parts for pair in _scale_pairs(part).tolist()),
        default=0.0,
    )


def _scale_pairs(part: PhaseTensor) -> np.ndarray:
    """Return float64 (pairs, 2): the scales of the pairs of codes that joint tables hold."""
    if part.stages == 1 and len(part.terms) == 2:
        return part.scales[0, :, :, 0, 0].astype(np.float64).T  # (axis, term)
    return _stage_pairs(part)


def _stage_pairs(part: PhaseTensor) -> np.ndarray:
    """Return float64 (terms * pairs * 2, 2): the two scales of each joint unit, in unit order."""
    scales = part.scales[..., 0, 0].astype(np.float64)  # (T, terms, axis)
    paired = scales[: part.stages // 2 * 2].reshape(-1, 2, *scales.shape[1:])
    return paired.transpose(2, 0, 3, 1).reshape(-1, 2)


def joint_offset(limit: int) -> int:
    """Return what is added to joint entries, which are -limit .. limit."""
    return limit + 1


def pair_arrays(part: PhaseTensor, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the joint tables and scales of U and W of a part of one stage.

    Returns:
        uint8 (4, 16), for the nibble ``u | w << 2`` and p:q the ratio of an axis' scales:
        p Re u + q Re w, p Re u - q Re w, p Im u + q Im w, q Im w - p Im u, all plus offset; and
        float32 (4,), the scales of the units of `pair_codebook`.
    """
    index, tables, scales = np.arange(16), [], []
    for values, (u_scale, w_scale) in zip((_RE, _IM), _scale_pairs(part).tolist(), strict=True):
        p, q, _ = joint_ratio(u_scale, w_scale, limit)
        u, w = p * values[index & 3].astype(np.int16), q * values[index >> 2].astype(np.int16)
        tables += [u + w, u - w if values is _RE else w - u]
        scales += [(p * u_scale + q * w_scale) / (p * p + q * q)] * 2
    return (np.stack(tables) + joint_offset(limit)).astype(np.uint8), np.array(scales, np.float32)


def combined_arrays(
    weights: np.ndarray, units: np.ndarray, limit: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the tables and scales of `combined_codebook`.

    Args:
        weights: int (2 terms, 2 stages, 2 axes), the integers that codes stand for; those of an
            axis add up to ``limit`` at most.
        units: float (2 axes), what they are multiples of.
        limit: see `joint_offset`.

    Returns:
        uint8 (4, 16), Re U, Im U, Re W, Im W for the nibble of two stages' codes, those of U plus
        offset and those of W in two's complement; float32 (4,), the scales of the units.
    """
    index, tables = np.arange(16), []
    for term in (0, 1):
        for values, (p, q) in zip((_RE, _IM), weights[term].T.tolist(), strict=True):
            table = p * values[index & 3].astype(np.int16) + q * values[index >> 2]
            tables.append(table + (0 if term else joint_offset(limit)))
    scales = np.repeat(np.asarray(units, np.float32), 2)
    return np.stack(tables).astype(np.int16).astype(np.uint8), scales


def joint_arrays(part: PhaseTensor, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a part's joint tables and scales, of pairs of stages.

    Returns:
        uint8 (joint units, 16), p * (stage of the low code) + q * (stage of the high code) +
        offset, and float32 (units,), the scales of all units of `joint_codebook`.
    """
    index, tables, scales = np.arange(16), [], []
    for i, (first, second) in enumerate(_stage_pairs(part).tolist()):
        p, q, _ = joint_ratio(first, second, limit)
        axis = (_RE, _IM)[i % 2].astype(np.int16)
        tables.append(p * axis[index & 3] + q * axis[index >> 2] + joint_offset(limit))
        scales.append((p * first + q * second) / (p * p + q * q))
    if part.stages % 2:
        scales += part.scales[-1, :, :, 0, 0].ravel().tolist()
    return np.stack(tables).astype(np.uint8), np.array(scales, np.float32)
