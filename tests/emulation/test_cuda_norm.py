"""Norms on a simulated CUDA device against NumPy, alone and with the sum before them."""

from __future__ import annotations

import numpy as np
import pytest

from fairy_compile.kernels.cuda_norm import build_rms_norm
from tests.emulation import cuda_library, cuda_rig, metal_rig
from tests.emulation.gpu_cases import call, compile_functions, host_target

missing = cuda_rig.missing_tools() or metal_rig.missing_tools()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))

EPS = 1e-5
# Less than a warp, a block that is not full, rows that take threads several turns.
SIZES = {"float16": (64, 1000, 8200), "float32": (36, 4100)}


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> cuda_library.CudaRig:
    return cuda_library.CudaRig(tmp_path_factory.mktemp("cuda"))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_norms_equal_numpy(rig, tmp_path, dtype: str) -> None:
    """A sum of n squares errs by n eps, 2^-24 each; outputs round to ``dtype`` once."""
    rng, target = np.random.default_rng(0), host_target("cuda")
    functions = {
        f"norm_{size}_{batch}_{add}": build_rms_norm(size, EPS, dtype, batch, add=add)
        for size in SIZES[dtype]
        for batch in ("single", "many")
        for add in (False, True)
    }
    library = compile_functions(functions, target, tmp_path)
    for size in SIZES[dtype]:
        weight = rng.standard_normal(size).astype(np.float32)
        for batch, rows in (("single", 1), ("many", 3)):
            x, other = rng.standard_normal((2, rows, size)).astype(dtype)
            empty = np.full_like(x, np.nan)
            y = call(library, f"norm_{size}_{batch}_False", target, [x, weight, empty])[-1]
            check(y, x, weight)
            arrays = [x, other, weight, empty, empty]
            total, y = call(library, f"norm_{size}_{batch}_True", target, arrays)[-2:]
            np.testing.assert_array_equal(total, x + other)
            check(y, total, weight)


def check(y: np.ndarray, x: np.ndarray, weight: np.ndarray) -> None:
    exact = x.astype(np.float64)
    want = exact / np.sqrt((exact**2).mean(axis=1, keepdims=True) + EPS) * weight
    rounding = np.finfo(y.dtype).eps / 2
    allowed = (rounding + (x.shape[1] / 2 + 8) * 2.0**-24) * np.abs(want) + np.finfo(y.dtype).tiny
    assert np.all(np.abs(y - want) <= allowed)
