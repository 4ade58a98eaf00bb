"""The packed weight of GPU kernels: its index formula, and the way back."""

from __future__ import annotations

import numpy as np
import pytest

from fairy_compile.kernels.gpu_layout import UNIT, WordsLayout
from tests.kernels.cases import BOTH, ONLY_W, make_parts, make_spec

LAYOUT = WordsLayout()


@pytest.mark.parametrize("scale", ["tensor", "row", "tile64"])
@pytest.mark.parametrize("terms", [BOTH, ONLY_W])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_round_trip_is_exact(stages: int, terms, scale: str) -> None:
    spec = make_spec((70, 65, 3), 130, stages, terms, scale, act="float")
    parts = make_parts(spec)
    arrays = LAYOUT.pack(parts, spec)
    for name, array in LAYOUT.arrays(spec).items():
        assert (arrays[name].shape, str(arrays[name].dtype)) == (array.shape, array.dtype)
    for part, back in zip(parts, LAYOUT.unpack(arrays, spec), strict=True):
        np.testing.assert_array_equal(back.codes, part.codes)
        np.testing.assert_array_equal(back.scales, part.scales)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_every_code_is_where_the_formula_says(stages: int) -> None:
    spec = make_spec((5, 4), 37, stages, BOTH, "tensor", act="float")
    parts = make_parts(spec)
    words = LAYOUT.pack(parts, spec)["codes"]
    codes = np.concatenate([part.unpack() for part in parts], axis=2)
    for t, k, i, c in np.ndindex(codes.shape):
        width = 4 if t ^ 1 < stages else 2
        per = 32 // width
        word = (c // UNIT) * 2 * stages + k * stages + 2 * (t // 2) + c % UNIT // per
        bit = width * (c % per) + 2 * (t % 2)
        assert words[i, word] >> np.uint32(bit) & 3 == codes[t, k, i, c]


def test_scales_of_a_part_follow_those_of_the_part_before() -> None:
    spec = make_spec((70, 9), 200, 2, BOTH, "tile64", act="float")
    parts = make_parts(spec)
    scales = LAYOUT.pack(parts, spec)["scales"]
    assert scales.shape == (2 + 1, 4, 4, 2)
    np.testing.assert_array_equal(scales[2, 3, 1 * 2 + 1], parts[1].scales[1, 1, :, 0, 3])
