"""Packed weights of the CUDA kernels, and the arithmetic of decode on a NumPy tensor core."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairy_compile.kernels.cuda_layout import CudaLayout, planes
from fairy_compile.op import phase_gemm_reference, quantize_activations
from tests.kernels.cases import BOTH, ONLY_W, make_parts, make_spec, make_x

LAYOUT = CudaLayout()


@given(
    parts=st.lists(st.integers(1, 150), min_size=1, max_size=3).map(tuple),
    m=st.integers(1, 300),
    stages=st.integers(1, 4),
    terms=st.sampled_from([BOTH, ONLY_W]),
    scale=st.sampled_from(["tensor", "row", "tile64"]),
)
@settings(max_examples=60, deadline=None)
def test_unpack_undoes_pack(parts, m, stages, terms, scale):
    spec = make_spec(parts, m, stages, terms, scale)
    tensors = make_parts(spec)
    arrays = LAYOUT.pack(tensors, spec)
    assert list(arrays) == list(LAYOUT.arrays(spec))
    for name, want in LAYOUT.arrays(spec).items():
        assert (arrays[name].shape, arrays[name].dtype) == (want.shape, want.dtype), name
    for part, back in zip(tensors, LAYOUT.unpack(arrays, spec), strict=True):
        np.testing.assert_array_equal(back.codes, part.codes)
        np.testing.assert_array_equal(back.scales, part.scales)


def test_packing_in_row_blocks_equals_packing_at_once(monkeypatch):
    spec = make_spec((70, 40), 130)
    at_once = LAYOUT.pack(make_parts(spec), spec)["codes"]
    monkeypatch.setattr("fairy_compile.kernels.cuda_layout._TILES_AT_ONCE", 2)
    np.testing.assert_array_equal(LAYOUT.pack(make_parts(spec), spec)["codes"], at_once)


@pytest.mark.parametrize("terms", [BOTH, ONLY_W], ids="".join)
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_bits_lie_where_the_index_formula_says(stages, terms):
    spec = make_spec((40,), 300, stages, terms)
    (part,) = make_parts(spec)
    packed, codes, p = LAYOUT.pack([part], spec)["codes"], part.unpack(), planes(spec)
    signs = {0: (0, 0), 1: (1, 0), 2: (1, 1), 3: (0, 1)}  # (q, p) of the phases 1, i, -1, -i
    for row, column in [(0, 0), (17, 5), (31, 299), (39, 130), (9, 63)]:
        tile, in_tile, group, block = row // 16, row % 16, column // 128, column % 128 // 32
        lane = 4 * (in_tile % 8) + column % 32 // 8
        byte = 4 * (in_tile // 8 + 2 * (column % 8 // 4)) + column % 4
        for stage in range(stages):
            for term in range(len(terms)):
                for which, sign in enumerate(signs[int(codes[stage, term, row, column])]):
                    bit = block * p + 2 * (stage * len(terms) + term) + which
                    stored = packed[tile, group, bit // 8, lane, byte] >> (bit % 8) & 1
                    assert stored == sign


@pytest.mark.parametrize("terms", [BOTH, ONLY_W], ids="".join)
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_codes_take_no_more_than_their_bits(terms, stages):
    spec = make_spec((64,), 256, stages, terms)
    assert LAYOUT.arrays(spec)["codes"].nbytes * 8 == planes(spec) * 64 * 256


def _operand_a(fragment: np.ndarray, mask: int) -> np.ndarray:
    """Return A (16, 32) of mma.m16n8k32 from a lane's 16 bytes, by the table of the PTX ISA."""
    a = np.zeros((16, 32), np.int64)
    for lane, register, e in np.ndindex(32, 4, 4):
        row = lane // 4 + 8 * (register % 2)
        column = 4 * (lane % 4) + 16 * (register // 2) + e
        a[row, column] = fragment[lane, 4 * register + e] & mask
    return a


def _operand_b(columns: np.ndarray) -> np.ndarray:
    """Return B (32, 8); a lane's two registers are eight neighbouring columns of x.

    Args:
        columns: (8, 32), a block of columns of x for every column of B.
    """
    b = np.zeros((32, 8), np.int64)
    for lane, register, e in np.ndindex(32, 2, 4):
        row = 4 * (lane % 4) + 16 * register + e
        b[row, lane // 4] = columns[lane // 4, 8 * (lane % 4) + 4 * register + e]
    return b


@pytest.mark.parametrize("terms", [BOTH, ONLY_W], ids="".join)
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_bit_planes_on_a_tensor_core_are_the_phase_gemm(stages, terms):
    """Signs from planes, digits of int16, sums of stages, scales: all of decode in NumPy."""
    spec = make_spec((16,), 128, stages, terms, act="int16")
    (part,), x = make_parts(spec), make_x(spec)
    fragments, p = LAYOUT.pack([part], spec)["codes"][0, 0], planes(spec)
    q, scale = quantize_activations(x, act="int16")
    q = q[0].astype(np.int64)  # (half, column)
    high = (q + 128) >> 8
    digits = np.concatenate([high, q - 256 * high, np.zeros_like(q), np.zeros_like(q)])
    bits = np.zeros((p, 16, 2), np.int64)  # sum of bit * x, of (plane, row, half)
    for block, plane in np.ndindex(4, p):
        bit = block * p + plane
        a = _operand_a(fragments[bit // 8], 1 << bit % 8)
        c = a @ _operand_b(digits[:, 32 * block : 32 * block + 32])
        joined = 256 * c[:, :2] + c[:, 2:4]
        assert not np.any(joined % (1 << bit % 8))
        bits[plane] += joined >> bit % 8
    y = np.zeros((2, 16))
    for plane in range(0, p, 2):
        stage, term = divmod(plane // 2, len(terms))
        s_re, s_im = part.scales[stage, term, :, 0, 0].astype(float)
        re = s_re * (q.sum(axis=1) - bits[plane] - bits[plane + 1]) * scale[0, :, 0]
        im = s_im * (bits[plane] - bits[plane + 1]) * scale[0, :, 0]
        sign = 1 if terms[term] == "U" else -1
        y[0] += re[:, 0] - sign * im[:, 1]
        y[1] += im[:, 0] + sign * re[:, 1]
    np.testing.assert_allclose(y.ravel(), phase_gemm_reference(x, [part], "int16")[0], atol=2e-6)
