"""Combined tables of the ARM kernels: all codes of a weight in one set of integer sums.

With R, I the real and imaginary parts of U and W, and a, b = Re x, Im x,

    Re y = (Re U + Re W) a + (Im W - Im U) b        Im y = (Im U + Im W) a + (Re U - Re W) b

so that four products do, if a table can be indexed by the codes of both terms. Four bits index a
table, which is enough for T = 1. For T = 2 it takes a change of basis: a phase c is a pair of
signs (s, t), both +1 or -1,

    Re c = (s + t) / 2,  Im c = (t - s) / 2          codes 0..3 are (+ +), (- +), (- -), (+ -)

and if the scales of the codes k are v_k times one number for each axis, with integers v_k, sums
over k of v_k s_k and of v_k t_k suffice. With D+, D- = sum over the codes of U of v s, plus or
minus the same of W, E+, E- likewise of t, and r, i the numbers of the axes,

    Re y = (r (D+ a + E+ a) + i (D- b - E- b)) / 2
    Im y = (i (E+ a - D+ a) + r (D- b + E- b)) / 2

D needs the four signs s of a weight only, and E the four t: a table look-up each. Where one
multiply meets both halves of x, the terms are looked up apart and the signs that differ go to x:
D+ a and D- b are Du with (a, b) plus Dw with (a, -b).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fairy_compile.kernels.x86_tables import Lookup, Product, Unit, joint_ratio
from fairy_compile.op import PhaseSpec
from fairy_compile.phase import PhaseTensor

TABLE_LIMIT = 127  # tables are int8
_UNIT_STEP = 0.25

TOGETHER, APART = 0, 1
"""Sets of combined tables: both terms in an entry, or one."""

_RE = np.array([1, 0, -1, 0])
_IM = np.array([0, 1, 0, -1])


def has_combined(spec: PhaseSpec) -> bool:
    """Tell whether there are combined tables: tensor scales, both terms, and one or two stages."""
    return spec.scale == "tensor" and spec.terms == ("U", "W") and spec.stages <= 2


def has_signs(spec: PhaseSpec) -> bool:
    """Tell whether codes are packed as signs, which the combined tables of two stages want."""
    return has_combined(spec) and spec.stages == 2


@dataclass(frozen=True)
class ArmLookup(Lookup):
    """A `Lookup` of a combined table.

    Attributes:
        conjugate: it meets (Re x, -Im x) instead of (Re x, Im x).
    """

    conjugate: bool = False


@dataclass(frozen=True)
class Share:
    """What a sum gives to an output: plus or minus the sum times a scale of the set.

    Attributes:
        output: 0 for the real, 1 for the imaginary part of y.
        scale: index into the combined scales of the set.
        negative: it is subtracted.
    """

    output: int
    scale: int
    negative: bool = False


@dataclass(frozen=True)
class CombinedCodebook:
    """Like `Codebook`, for combined tables.

    Attributes:
        terms: which set of tables it reads, `TOGETHER` or `APART`.
        units: sums that share look-ups.
        lookups: the look-ups of a step.
        shares: (unit, index of the product) -> where the sum goes.
    """

    terms: int
    units: tuple[Unit, ...]
    lookups: tuple[ArmLookup, ...]
    shares: Mapping[tuple[int, int], tuple[Share, ...]]


_RE_BY_RE, _IM_BY_IM = (Share(0, 0),), (Share(1, 0),)
_SHARES = {
    # sums with a, sums with b, of tables 0 and 1; the same of tables 2 and 3
    1: ((_RE_BY_RE, _IM_BY_IM), ((Share(1, 1),), (Share(0, 1),))),
    2: (
        ((Share(0, 0), Share(1, 1, True)), (Share(0, 1), Share(1, 0))),
        ((Share(0, 0), Share(1, 1)), (Share(0, 1, True), Share(1, 0))),
    ),
}


def combined_codebook(spec: PhaseSpec, terms: int) -> CombinedCodebook:
    """Return the codebook of a set of combined tables.

    One stage has two column blocks a step and looks all tables up with the nibble of a block; two
    stages have one block, whose signs s and t are nibbles.
    """
    products = tuple(Product(half, 0) for half in (0, 1))  # outputs: see shares
    groups = range(2)  # tables 0 and 1, tables 2 and 3
    if spec.stages == 1:
        places = [(group, block, block) for block in (0, 1) for group in groups]
    else:
        places = [(group, group, 0) for group in groups]
    shares = _SHARES[spec.stages]
    if terms == APART:
        # The imaginary axis of one stage has its minus at U.
        minus = {0: 1, 1: 0 if spec.stages == 1 else 1}
        return CombinedCodebook(
            terms,
            tuple(Unit("UW", group, True, products) for group in groups),
            tuple(
                ArmLookup(nibble, block, 2 * group + term, group, term == minus[group])
                for group, nibble, block in places
                for term in (0, 1)
            ),
            {(group, half): shares[group][half] for group in groups for half in (0, 1)},
        )
    return CombinedCodebook(
        terms,
        tuple(Unit("UW", group, True, (products[half],)) for group in groups for half in (0, 1)),
        tuple(
            ArmLookup(nibble, block, 2 * group + half, 2 * group + half)
            for group, nibble, block in places
            for half in (0, 1)
        ),
        {(2 * group + half, 0): shares[group][half] for group in groups for half in (0, 1)},
    )


def combined_arrays(part: PhaseTensor) -> tuple[np.ndarray, np.ndarray]:
    """Return a part's combined tables int8 (2, 4, 16) and scales float32 (2, 2), by set.

    Tables are in the order that `combined_codebook` looks them up, with both terms in an entry
    (what meets a, what meets b, twice), or one (U, W, twice). The index is ``u | w << 2`` for one
    stage and, for two, a nibble of `sign_bytes`.
    """
    tables, scales = [], []
    for terms in (TOGETHER, APART):
        weights, units, _ = combined_weights(part, terms)
        by_term = _stage_entries(weights) if part.stages == 1 else _sign_entries(weights)
        pairs = []
        for group, (u, w) in enumerate(by_term):
            minus = w - u if part.stages == 1 and group else u - w
            pairs += [u + w, minus] if terms == TOGETHER else [u, w]
        tables.append(np.stack(pairs))
        scales.append(units if part.stages == 1 else units / 2)
    return np.stack(tables).astype(np.int8), np.stack(scales).astype(np.float32)


def combined_weights(part: PhaseTensor, terms: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Return integers int64 (T, 2, 2) over (stage, term, axis), units (2,) and the relative error.

    Integers times the unit of their axis stand for the scales. With one stage each axis has
    integers of its own, the nearest ratio of U to W; with two, both axes share them, the best of
    some roundings of the summed scales: what matters is that the scales of the axes are nearly
    proportional, as they are for weights without a preferred phase. The error is |scales - what
    stands for them| / |scales| in the Euclidean norm, which is also about the relative error of
    outputs for independent activations.
    """
    scales = part.scales[..., 0, 0].astype(np.float64)
    if part.stages == 1:
        weights = np.zeros((1, 2, 2), np.int64)
        for axis in np.flatnonzero(scales.any(axis=(0, 1))):
            u, w = scales[0, :, axis].tolist()
            weights[0, :, axis] = joint_ratio(u, w, TABLE_LIMIT)[:2]
    else:
        weights = _common_weights(scales, terms)[..., None].repeat(2, axis=2)
    units = _fit(scales, weights)
    error = np.linalg.norm(scales - weights * units) / max(np.linalg.norm(scales), 1e-300)
    return weights, units, float(error)


def combined_error(parts: Sequence[PhaseTensor], terms: int) -> float:
    """Return the largest relative error of any part's scales in combined tables."""
    return max(combined_weights(part, terms)[2] for part in parts)


def _common_weights(scales: np.ndarray, terms: int) -> np.ndarray:
    """Return integers (T, terms) nearly proportional to scales (T, terms, axis) of both axes."""
    wanted = scales.sum(axis=2)
    size = wanted.sum() if terms == TOGETHER else wanted.sum(axis=0).max()
    if size == 0:
        return np.zeros(wanted.shape, np.int64)
    # At the last candidate, rounding up cannot exceed the limit; smaller ones often fit better.
    codes = wanted.size if terms == TOGETHER else len(wanted)
    totals = np.arange(TABLE_LIMIT // 3, TABLE_LIMIT + _UNIT_STEP / 2, _UNIT_STEP)
    totals = np.union1d(totals, [TABLE_LIMIT - codes / 2])
    candidates = [np.rint(wanted * (total / size)).astype(np.int64) for total in totals]

    def fits(weights: np.ndarray) -> bool:
        largest = weights.sum() if terms == TOGETHER else weights.sum(axis=0).max()
        return bool(largest <= TABLE_LIMIT)

    def error(weights: np.ndarray) -> float:
        spread = weights[..., None].repeat(2, axis=2)
        return float(np.linalg.norm(scales - spread * _fit(scales, spread)))

    return min(filter(fits, candidates), key=error)


def _fit(scales: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the least-squares unit of each axis, for (T, terms, axis) scales and integers."""
    return (scales * weights).sum(axis=(0, 1)) / np.maximum((weights**2).sum(axis=(0, 1)), 1)


def _stage_entries(weights: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (of U, of W) entries (16,) for each axis, of the nibble ``u | w << 2``."""
    index = np.arange(16)
    return [
        (weights[0, 0, axis] * values[index & 3], weights[0, 1, axis] * values[index >> 2])
        for axis, values in enumerate((_RE, _IM))
    ]


def _sign_entries(weights: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (of U, of W) entries (16,) for the nibble of s and that of t of `sign_bytes`."""
    signs = 1 - 2 * (np.arange(16)[:, None] >> np.arange(4) & 1)  # (16, bit)
    low, high = signs[:, :2] @ weights[:, :, 0], signs[:, 2:] @ weights[:, :, 0]  # (16, term)
    return [(low[:, 0], high[:, 1]), (high[:, 0], low[:, 1])]


def sign_bytes() -> np.ndarray:
    """Return uint8 (256,), byte of codes ``u1 | u2 << 2 | w1 << 4 | w2 << 6`` -> byte of signs.

    Bits 0-3 are the signs s of u1, u2, w1, w2, and bits 4-7 the signs t of w1, w2, u1, u2; 1 is
    minus. So s and t are nibbles, ``byte >> 2 & 15`` indexes signs of W, and the low two bits with
    the high two those of U, see `sign_nibble`.
    """
    byte = np.arange(256)
    u1, u2, w1, w2 = (byte >> shift & 3 for shift in (0, 2, 4, 6))
    bits = [_s(u1), _s(u2), _s(w1), _s(w2), _t(w1), _t(w2), _t(u1), _t(u2)]
    return sum(bit << i for i, bit in enumerate(bits)).astype(np.uint8)


def sign_nibble() -> np.ndarray:
    """Return (16,): signs ``s1 | s2 << 1 | t1 << 2 | t2 << 3`` -> codes ``c1 | c2 << 2``."""
    codes = np.arange(16)
    first, second = codes & 3, codes >> 2
    signs = _s(first) | _s(second) << 1 | _t(first) << 2 | _t(second) << 3
    return np.argsort(signs)


def _s(code: np.ndarray) -> np.ndarray:
    return (code ^ code >> 1) & 1


def _t(code: np.ndarray) -> np.ndarray:
    return code >> 1
