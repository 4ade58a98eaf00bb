"""Hugging Face directories as a source of dense tensors and phase codes."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from fairy_compile.config import QuantConfig
from fairy_compile.errors import FairyError, UnsupportedError
from fairy_compile.frontends import open_source
from fairy_compile.phase import quantize

from .conftest import DTYPES, tiny_tensors

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_tensors_keep_dtype_and_values(make_model, dtype):
    tensors = tiny_tensors(dtype)
    source = open_source(make_model(tensors))
    assert (source.kind, source.quant) == ("huggingface", None)
    assert source.config["model_type"] == "llama"
    assert source.names() == list(tensors)
    for name, want in tensors.items():
        got = source.dense(name)
        assert source.dtype(name) == got.dtype.name == want.dtype.name
        assert source.shape(name) == want.shape
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", ["tensor", "row", "tile64"])
def test_phase_is_the_rule_in_float32_on_stored_values(make_model, dtype, scale):
    tensors = tiny_tensors(dtype)
    quant = QuantConfig("w1", method="phase", scale=scale, stages_for={"lm_head": 3})
    source = open_source(make_model(tensors))
    for layer, stages in ((Q_PROJ, 1), ("lm_head", 3)):
        got = source.phase(layer, quant)
        want = quantize(tensors[f"{layer}.weight"].astype(np.float32), stages, scale=scale)
        assert (got.stages, got.scale) == (stages, scale)
        np.testing.assert_array_equal(got.codes, want.codes)
        np.testing.assert_array_equal(got.scales, want.scales)


def test_sharded_equals_single(make_model, tensors):
    single = open_source(make_model(tensors, "single"))
    sharded = open_source(make_model(tensors, "sharded", shards=3))
    assert sorted(single.names()) == sorted(sharded.names())
    got, want = (source.phase(Q_PROJ, QuantConfig()) for source in (sharded, single))
    np.testing.assert_array_equal(got.codes, want.codes)
    np.testing.assert_array_equal(got.scales, want.scales)


def test_plans(make_model):
    source = open_source(make_model())
    quant = QuantConfig(exempt=("lm_head",))
    assert source.plan(Q_PROJ, quant).phase
    assert source.plan("lm_head", quant).reason == "exempt by pattern 'lm_head'"
    assert source.plan("model.layers.0.mlp.odd_proj", quant).reason == "odd dimension 33"


def test_planning_reads_no_data(make_model, monkeypatch):
    source = open_source(make_model())
    monkeypatch.setattr("fairy_compile.frontends.store.TensorStore.read", None)
    assert source.plan(Q_PROJ, QuantConfig()).phase


def test_phase_of_a_dense_layer_says_why_not(make_model):
    with pytest.raises(FairyError, match="odd_proj stays dense: odd dimension 33"):
        open_source(make_model()).phase("model.layers.0.mlp.odd_proj", QuantConfig())


def test_unknown_layer(make_model):
    with pytest.raises(FairyError, match=r"no tensor 'model\.layers\.9"):
        open_source(make_model()).plan("model.layers.9.self_attn.q_proj", QuantConfig())


def test_baked_weights_are_recovered(make_model, tensors):
    weight = np.random.default_rng(1).standard_normal((64, 96)).astype(np.float32)
    want = quantize(weight, 2)
    tensors[f"{Q_PROJ}.weight"] = want.dequantize()
    got = open_source(make_model(tensors)).phase(Q_PROJ, QuantConfig("w2"))
    np.testing.assert_array_equal(got.codes, want.codes)
    np.testing.assert_allclose(got.scales, want.scales, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_weights_name_the_tensor(make_model, bad, dtype):
    tensors = tiny_tensors(dtype)
    tensors[f"{Q_PROJ}.weight"][2, 3] = bad
    source = open_source(make_model(tensors))
    for read in (
        lambda: source.dense(f"{Q_PROJ}.weight"),
        lambda: source.phase(Q_PROJ, QuantConfig()),
    ):
        with pytest.raises(FairyError, match=r"q_proj\.weight holds 1 non-finite.*\(2, 3\)"):
            read()


def test_int8_weights_are_refused(make_model, tensors):
    tensors["lm_head.weight"] = np.ones((10, 8), np.int8)
    allowed = "'lm_head.weight' is int8; allowed: float32, float16, bfloat16"
    with pytest.raises(UnsupportedError, match=allowed):
        open_source(make_model(tensors))


def test_checkpoints_of_other_quantisers_are_refused(make_model):
    directory = make_model()
    config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="already quantised by 'gptq'"):
        open_source(directory)


def test_tokenizer_files_and_hashes(make_model):
    source = open_source(make_model(shards=2))
    assert [p.name for p in source.tokenizer_files()] == [
        "tokenizer.json",
        "generation_config.json",
    ]
    hashes = source.sha256()
    assert set(hashes) == {
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    }
    assert all(len(digest) == 64 for digest in hashes.values())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_stays_bounded_by_the_largest_tensor(tmp_path):
    # A sparse file of 400 MB, ten tensors of 40 MB, read in a process of its own.
    rows, count = 5_000, 10
    size = rows * 2000 * 4
    header = {
        f"layers.{i}.weight": {
            "dtype": "F32",
            "shape": [rows, 2000],
            "data_offsets": [i * size, (i + 1) * size],
        }
        for i in range(count)
    }
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + count * size)
    (tmp_path / "config.json").write_text("{}")
    code = (
        "import re, sys\n"
        "from fairy_compile.frontends import open_source\n"
        "status = lambda: open('/proc/self/status').read()\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', status())[1]) // 1024\n"
        "source = open_source(sys.argv[1])\n"
        "before = peak()\n"
        "for name in source.names():\n"
        "    source.dense(name)\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True
    )
    growth = int(done.stdout)
    assert 30 < growth < 150, f"peak memory grew by {growth} MiB over 400 MB of tensors of 40 MB"


def test_bfloat16_is_not_rounded_on_the_way(make_model, tensors):
    values = np.arange(0, 2**16, 257, dtype=np.uint16)[:80].view(ml_dtypes.bfloat16)
    tensors = {"lm_head.weight": values.reshape(10, 8)}
    got = open_source(make_model(tensors)).dense("lm_head.weight")
    np.testing.assert_array_equal(got.view(np.uint16), tensors["lm_head.weight"].view(np.uint16))
