"""Weights that one table mode cannot hold accurately are compiled with the other."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fairy_compile as fc
from fairy_compile.compiler.schedules import Schedules
from fairy_compile.phase import from_widely_linear
from fairy_compile.targets import load_target
from tests.tiny_models import save_model


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


@pytest.mark.skipif(not load_target("cpu").has("avx2"), reason="this CPU has no AVX2")
def test_layers_of_one_shape_have_knobs_of_their_own(monkeypatch, tmp_path: Path) -> None:
    """As where a record serves those of them whose weights need nothing special."""
    model = save_model(tmp_path / "model", "llama")
    choose, seen = Schedules.choose, Counter()

    def choose_differently(self, kernel, spec, batch, *args):
        choice = choose(self, kernel, spec, batch, *args)
        distance = kernel.knobs["prefetch"][seen[spec, batch]]
        seen[spec, batch] += 1
        return replace(choice, values={**choice.values, "prefetch": distance})

    fc.build(model, act="int8", output=tmp_path / "same", context=64)
    monkeypatch.setattr(Schedules, "choose", choose_differently)
    fc.build(model, act="int8", output=tmp_path / "own", context=64)
    assert max(seen.values()) > 1
    logits = []
    for name in ("same", "own"):
        with fc.load(tmp_path / name) as loaded:
            logits.append(loaded.logits([1, 2, 3, 4, 5]))
    np.testing.assert_array_equal(*logits)  # reading ahead changes no number
