"""The dense kernel against NumPy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import tvm

from fairy_compile.kernels.dense import build_dense
from fairy_compile.targets import load_target

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "out", "inner"), [(1, 7, 33), (2, 5, 48), (17, 9, 40)])
def test_matches_numpy(dtype: str, batch: int, out: int, inner: int) -> None:
    rng = np.random.default_rng([batch, out, inner])
    x = rng.standard_normal((batch, inner)).astype(np.float32)
    weight = rng.standard_normal((out, inner)).astype(DTYPES[dtype])
    func = build_dense(out, inner, dtype, "single" if batch == 1 else "many")
    target = load_target("cpu").to_tvm()
    compiled = tvm.compile(func.with_attr("global_symbol", "main"), target=target)["main"]
    y = tvm.runtime.tensor(np.full((batch, out), np.nan, np.float32))
    compiled(tvm.runtime.tensor(x), tvm.runtime.tensor(weight), y)
    wide = weight.astype(np.float64)
    # A float32 sum of K products errs by at most K eps sum |x w|.
    bound = inner * np.finfo(np.float32).eps * (np.abs(x) @ np.abs(wide).T)
    assert (np.abs(y.numpy() - x.astype(np.float64) @ wide.T) <= bound).all()
