"""Packed bytes and tables of the x86 kernels."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fairy_compile.kernels.x86_layout import X86Layout
from fairy_compile.kernels.x86_tables import (
    joint_arrays,
    joint_ratio,
    joint_ratio_error,
    nibbles,
    pair_arrays,
    pair_codebook,
    split_tables,
)
from fairy_compile.op import PhaseSpec
from fairy_compile.phase import PhaseTensor, tile_shape

BOTH, ONLY_W = ("U", "W"), ("W",)


def make_parts(spec: PhaseSpec) -> list[PhaseTensor]:
    rng = np.random.default_rng(0)
    parts = []
    for n in spec.parts:
        codes = rng.integers(0, 4, (spec.stages, len(spec.terms), n, spec.m)).astype(np.uint8)
        rows, columns = tile_shape(spec.scale, n, spec.m)
        shape = (spec.stages, len(spec.terms), 2, -(-n // rows), -(-spec.m // columns))
        scales = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        parts.append(PhaseTensor.from_codes(codes, scales, spec.terms, spec.scale))
    return parts


@pytest.mark.parametrize("rows", [8, 16])
@pytest.mark.parametrize("terms", [BOTH, ONLY_W], ids="".join)
@pytest.mark.parametrize("scale", ["tensor", "row", "tile64"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_unpack_undoes_pack(rows, terms, scale, stages):
    spec = PhaseSpec((70, 9, 130), 200, stages, terms, scale, "int8")
    layout, parts = X86Layout(rows, 127), make_parts(spec)
    arrays = layout.pack(parts, spec)
    assert list(arrays) == list(layout.arrays(spec))
    for name, want in layout.arrays(spec).items():
        assert (arrays[name].shape, arrays[name].dtype) == (want.shape, want.dtype), name
    for part, back in zip(parts, layout.unpack(arrays, spec), strict=True):
        np.testing.assert_array_equal(back.codes, part.codes)
        np.testing.assert_array_equal(back.scales, part.scales)


def test_packing_in_row_blocks_equals_packing_at_once(monkeypatch):
    spec = PhaseSpec((70, 40), 130, 2, BOTH, "tensor", "int8")
    layout, parts = X86Layout(16, 127), make_parts(spec)
    at_once = layout.pack(parts, spec)["codes"]
    monkeypatch.setattr("fairy_compile.kernels.x86_layout._ROWS_AT_ONCE", 32)
    np.testing.assert_array_equal(layout.pack(parts, spec)["codes"], at_once)


def test_two_stage_byte_is_u1_u2_w1_w2():
    spec = PhaseSpec((40,), 130, 2, BOTH, "tensor", "int8")
    layout, (part,) = X86Layout(16, 127), make_parts(spec)
    packed, codes = layout.pack([part], spec)["codes"], part.unpack()
    for row, column in [(0, 0), (17, 5), (39, 129)]:
        (u1, w1), (u2, w2) = codes[:, :, row, column]
        byte = packed[row // 16, column // 4, 0, 4 * (row % 16) + column % 4]
        assert byte == u1 | u2 << 2 | w1 << 4 | w2 << 6


def test_one_stage_nibbles_are_consecutive_column_blocks():
    spec = PhaseSpec((40,), 130, 1, BOTH, "tensor", "int8")
    layout, (part,) = X86Layout(8, 127), make_parts(spec)
    packed, codes = layout.pack([part], spec)["codes"], part.unpack()[0]
    for row, column in [(0, 0), (17, 5), (39, 129)]:
        u, w = codes[:, row, column]
        byte = packed[row // 8, column // 8, 0, 4 * (row % 8) + column % 4]
        assert byte >> (4 * (column // 4 % 2)) & 15 == u | w << 2


@pytest.mark.parametrize("terms", [BOTH, ONLY_W], ids="".join)
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_codes_take_no_more_than_their_bits(terms, stages):
    spec = PhaseSpec((64,), 256, stages, terms, "tensor", "int8")
    size = X86Layout(16, 127).arrays(spec)["codes"].nbytes
    assert size * 8 == 2 * stages * len(terms) * 64 * 256


@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_nibbles_hold_every_code_of_a_step_once(terms, stages):
    codes = [code for pair in nibbles(terms, stages) for code in pair]
    assert len(codes) == len(set(codes))
    assert len(codes) % 4 == 0


def test_split_tables_are_phases_plus_one():
    phases = np.array([1, 1j, -1, -1j])
    tables = split_tables().astype(int) - 1
    for index in range(16):
        low, high = phases[index & 3], phases[index >> 2]
        assert tables[:, index].tolist() == [low.real, low.imag, high.real, high.imag]


def test_joint_ratio_is_bounded_and_nearest():
    for limit in (127, 63):
        bound = 1 / (2 * (limit - 1))
        # The last direction is halfway between an axis and its neighbour: the worst case.
        angles = [*np.linspace(0, np.pi / 2, 500), math.atan(1 / (limit - 1)) / 2]
        found = [joint_ratio(math.cos(t), math.sin(t), limit) for t in angles]
        assert all(p + q <= limit for p, q, _ in found)
        assert 0.999 * bound < found[-1][2] == max(e for *_, e in found) < bound
    assert joint_ratio(2.0, 1.0, 127) == (2, 1, 0.0)
    assert joint_ratio(0.0213, 0.0101, 127)[:2] == _nearest_by_search(0.0213, 0.0101, 127)


def _nearest_by_search(first: float, second: float, limit: int) -> tuple[int, int]:
    angle = math.atan2(second, first)
    pairs = [(p, q) for p in range(limit + 1) for q in range(limit + 1 - p) if p + q]
    pairs = [(p, q) for p, q in pairs if math.gcd(p, q) == 1]
    return min(pairs, key=lambda pair: abs(math.atan2(pair[1], pair[0]) - angle))


@pytest.mark.parametrize("limit", [127, 63])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_joint_tables_times_scales_are_the_stage_sums(limit, stages):
    spec = PhaseSpec((5,), 8, stages, BOTH, "tensor", "int8")
    (part,) = make_parts(spec)
    tables, scales = joint_arrays(part, limit)
    error = joint_ratio_error([part], limit)
    phases, index, unit = np.array([1, 1j, -1, -1j]), np.arange(16), 0
    for term in range(2):
        for stage in range(0, stages - 1, 2):
            for axis, value in enumerate((phases.real, phases.imag)):
                s1, s2 = part.scales[stage : stage + 2, term, axis, 0, 0].astype(float)
                want = s1 * value[index & 3] + s2 * value[index >> 2]
                got = scales[unit] * (tables[unit].astype(float) - (limit + 1))
                allowed = math.sqrt(2) * error * math.hypot(s1, s2) + 1e-6
                assert np.abs(got - want).max() <= allowed
                unit += 1
    assert len(tables) == unit


def test_joint_ratio_error_tells_whether_joint_applies():
    spec = PhaseSpec((5,), 8, 2, BOTH, "row", "int8")
    assert joint_ratio_error(make_parts(spec), 127) == math.inf
    spec = PhaseSpec((5,), 8, 1, ("W",), "tensor", "int8")
    assert joint_ratio_error(make_parts(spec), 127) == 0


@pytest.mark.parametrize("limit", [127, 63])
def test_pair_tables_times_scales_are_the_real_block(limit):
    spec = PhaseSpec((5,), 8, 1, BOTH, "tensor", "int8")
    (part,) = make_parts(spec)
    tables, scales = pair_arrays(part, limit)
    error = joint_ratio_error([part], limit)
    phases, index = np.array([1, 1j, -1, -1j]), np.arange(16)
    s = part.scales[0, :, :, 0, 0].astype(float)
    u, w = phases[index & 3], phases[index >> 2]
    u, w = (s[t, 0] * v.real + 1j * s[t, 1] * v.imag for t, v in enumerate((u, w)))
    # The widely-linear pair back to A11, A22, A21, A12.
    blocks = [u.real + w.real, u.real - w.real, u.imag + w.imag, w.imag - u.imag]
    for unit, want in enumerate(blocks):
        got = scales[unit] * (tables[unit].astype(float) - (limit + 1))
        allowed = math.sqrt(2) * error * math.hypot(*s[:, unit // 2]) + 1e-6
        assert np.abs(got - want).max() <= allowed
    # What the sums meet and where they go is y = U x + W conj x.
    rng = np.random.default_rng(0)
    x = complex(*rng.standard_normal(2))
    for i in range(16):
        y = [0.0, 0.0]
        for unit, kept in enumerate(pair_codebook().units):
            (product,) = kept.products
            y[product.output] += blocks[unit][i] * (x.real, x.imag)[product.half]
        assert complex(*y) == pytest.approx(u[i] * x + w[i] * x.conjugate())
