"""What holds for the packed weights of every kernel."""

from __future__ import annotations

import numpy as np
import pytest

from fairy_compile.kernels import FAMILIES
from tests.kernels.cases import BOTH, make_parts, make_spec

LAYOUTS = {
    kernel.layout.name: kernel for kernels in FAMILIES.values() for kernel in kernels
}  # one kernel of each


@pytest.mark.parametrize("scale", ["tensor", "row", "tile64"])
@pytest.mark.parametrize("act", ["int8", "int16", "float"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_scales_are_positive_where_rows_and_columns_are_padded(name: str, act: str, scale: str):
    """As `verify` asks of an artifact before it is loaded."""
    spec = make_spec((37, 9), 264, 2, BOTH, scale, act=act)
    packed = LAYOUTS[name].layout.pack(make_parts(spec), spec)
    scales = [array for array in packed.values() if array.dtype.kind == "f"]
    assert scales
    for array in scales:
        assert (np.isfinite(array) & (array > 0)).all()
