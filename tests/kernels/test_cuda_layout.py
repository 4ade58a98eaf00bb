"""Packed weights of the CUDA kernels, and the arithmetic of decode on a NumPy tensor core."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairy_compile.kernels.cuda_layout import CudaLayout, planes
from tests.kernels.cases import BOTH, ONLY_W, make_parts, make_spec

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
