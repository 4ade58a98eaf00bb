"""Weights that one table mode cannot hold accurately are compiled with the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fairy_compile as fc
from fairy_compile.phase import from_widely_linear
from fairy_compile.targets import load_target


@pytest.mark.skipif(not load_target("cpu").has("avx2"), reason="this CPU has no AVX2")
def test_scales_no_joint_table_holds_get_split_tables(model: Path, tmp_path: Path) -> None:
    layer = "model.layers.0.mlp.down_proj.weight"
    tensors = load_file(model / "model.safetensors")
    # A second stage of about 0.0062 of the first: between the ratios 0 and 1:126 that joint tables
    # can hold, and more than the combined ones of AVX2 may leave out.
    rng = np.random.default_rng(0)
    n, m = (size // 2 for size in tensors[layer].shape)
    units = np.array([1, 1j, -1, -1j])
    u, w = (
        units[rng.integers(0, 4, (n, m))] + 0.0055 * (rng.standard_normal((n, m, 2)) @ [1, 1j])
        for _ in range(2)
    )
    real = from_widely_linear((u.real, u.imag), (w.real, w.imag))
    tensors[layer] = real.astype(np.float32)
    save_file(tensors, model / "model.safetensors")
    report = fc.build(model, act="int8", output=tmp_path / "out", context=64)
    rows = {row.name: row.reason for row in report.layers}
    assert "tables=split" in rows["model.layers.0.mlp.down_proj"]
    assert "tables=split" not in rows["model.layers.0.self_attn.qkv_proj"]
    with fc.load(tmp_path / "out") as loaded:
        assert np.isfinite(loaded.logits([1, 2, 3])).all()
