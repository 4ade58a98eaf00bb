"""The packed checkpoint: what comes back, and what a damaged or hostile one is refused for."""

import json

import numpy as np
import pytest

from fairy_compile.config import QuantConfig
from fairy_compile.errors import FairyError, ModelFileError, UnsupportedError
from fairy_compile.frontends import open_source, write_packed
from fairy_compile.frontends.packed import METADATA_KEY
from fairy_compile.phase import PhaseTensor, quantize, quantize_complex_layer

from .conftest import safetensors_bytes

CONFIG = {"model_type": "llama", "hidden_size": 8}
QUANT = QuantConfig("w2", exempt=("gate",), stages_for={"head": 3})


def weight(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


@pytest.fixture
def layers() -> dict[str, PhaseTensor]:
    return {
        "q": quantize(weight(12, 10), 2),
        "head": quantize(weight(8, 14), 3, scale="row"),
        "tiles": quantize(weight(140, 12), 1, scale="tile64"),
        "complex": quantize_complex_layer(weight(5, 6), weight(5, 6, 1)),
    }


@pytest.fixture
def dense() -> dict[str, np.ndarray]:
    return {"norm.weight": np.ones(8, np.float16), "gate.weight": weight(4, 8)}


@pytest.fixture
def packed(tmp_path, layers, dense):
    write_packed(tmp_path / "packed", CONFIG, layers, dense, quant=QUANT)
    return tmp_path / "packed"


def assert_same(got: PhaseTensor, want: PhaseTensor) -> None:
    np.testing.assert_array_equal(got.codes, want.codes)
    np.testing.assert_array_equal(got.scales, want.scales)
    assert got.scales.dtype == want.scales.dtype
    assert (got.terms, got.scale, got.shape) == (want.terms, want.scale, want.shape)


# -------------------------------------------------------------------------------------- round trip


def test_everything_comes_back(packed, layers, dense):
    source = open_source(packed)
    assert (source.kind, source.quant) == ("packed", QUANT)
    assert source.config["hidden_size"] == 8
    assert set(source.names()) == {*dense, *(f"{name}.weight" for name in layers)}
    for name, tensor in layers.items():
        assert_same(source.phase(name, QuantConfig()), tensor)
        assert source.shape(f"{name}.weight") == tensor.shape
        assert source.dtype(f"{name}.weight") == "float32"
        np.testing.assert_array_equal(source.dense(f"{name}.weight"), tensor.dequantize())
    for name, array in dense.items():
        assert source.dtype(name) == array.dtype.name
        np.testing.assert_array_equal(source.dense(name), array)


def test_float16_scales_come_back(tmp_path, layers):
    halves = {name: tensor.with_scale_dtype(np.float16) for name, tensor in layers.items()}
    write_packed(tmp_path / "p", CONFIG, halves, {}, quant=QUANT)
    for name, tensor in halves.items():
        assert_same(open_source(tmp_path / "p").phase(name, QUANT), tensor)


def test_scales_of_two_dtypes_are_refused(tmp_path, layers):
    layers["q"] = layers["q"].with_scale_dtype(np.float16)
    with pytest.raises(FairyError, match="with_scale_dtype"):
        write_packed(tmp_path / "p", CONFIG, layers, {}, quant=QUANT)
    assert not (tmp_path / "p").exists()


def test_plan_reports_what_is_stored(packed):
    source = open_source(packed)
    plan = source.plan("head", QuantConfig("w1"))
    assert (plan.phase, plan.stages, plan.scale) == (True, 3, "row")
    assert plan.reason == "codes stored in the checkpoint"
    assert source.plan("gate", QUANT).reason == "stored dense in the checkpoint"
    assert source.plan("q", QuantConfig(exempt=("q",))).reason == "exempt by pattern 'q'"
    with pytest.raises(FairyError, match=r"no tensor 'nothing\.weight'"):
        source.plan("nothing", QUANT)
    with pytest.raises(FairyError, match="gate stays dense"):
        source.phase("gate", QUANT)


def test_the_files_are_as_the_format_says(packed, layers):
    from safetensors import safe_open

    table = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert (table["quant_method"], table["schema_version"]) == ("fairy", 1)
    assert table["codebook"] == "phase4"
    assert table["layers"]["tiles"] == {
        "stages": 1,
        "terms": ["U", "W"],
        "scale": "tile64",
        "tile": [64, 64],
        "shape": [140, 12],
    }
    with safe_open(packed / "model.safetensors", "np") as file:
        assert json.loads(file.metadata()[METADATA_KEY]) == table
        codes = file.get_tensor("q.codes")
        assert (codes.dtype, codes.shape) == (np.uint8, (2, 2, 6, 2))
        assert codes[0, 0, 0, 0] & 3 == layers["q"].unpack()[0, 0, 0, 0]
        assert file.get_tensor("tiles.scales").shape == (1, 2, 2, 2, 1)


# ----------------------------------------------------------------------------- hostile or damaged


def edit(packed, change) -> None:
    """Apply ``change`` to quantization_config, in config.json and the safetensors header alike."""
    path = packed / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))
    rewrite(packed, config["quantization_config"], lambda tensors: None)


def rewrite(packed, table, change) -> None:
    """Apply ``change`` to the dictionary of stored tensors."""
    from safetensors.numpy import load_file

    path = packed / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.write_bytes(safetensors_bytes(tensors, __metadata__={METADATA_KEY: json.dumps(table)}))


def table_of(packed):
    return json.loads((packed / "config.json").read_text())["quantization_config"]


def test_edit_alone_changes_nothing(packed, layers):
    edit(packed, lambda table: None)
    assert_same(open_source(packed).phase("q", QUANT), layers["q"])


@pytest.mark.parametrize("version", [0, 2, "1", 1.0, True, None])
def test_unknown_schema_version(packed, version):
    edit(packed, lambda table: table.update(schema_version=version))
    with pytest.raises(UnsupportedError, match="reads 1: update it"):
        open_source(packed)


def test_unknown_codebook(packed):
    edit(packed, lambda table: table.update(codebook="phase8"))
    with pytest.raises(UnsupportedError, match="codebook 'phase8'; allowed: 'phase4'"):
        open_source(packed)


def test_unknown_key(packed):
    edit(packed, lambda table: table.update(rotation="hadamard"))
    with pytest.raises(ModelFileError, match="rotation"):
        open_source(packed)


@pytest.mark.parametrize("value", [[], None, "q"])
def test_layers_that_are_not_a_table(packed, value):
    edit(packed, lambda table: table.update(layers=value))
    with pytest.raises(ModelFileError, match="layers is not an object"):
        open_source(packed)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stages", 0),
        ("stages", 5),
        ("stages", True),
        ("stages", "2"),
        ("terms", ["W", "U"]),
        ("terms", []),
        ("terms", None),
        ("scale", "column"),
        ("scale", ["row"]),
        ("tile", [1, 1]),
        ("shape", [12, 11]),
        ("shape", [-12, 10]),
        ("shape", [12, 0]),
        ("shape", [12]),
        ("shape", [12.0, 10.0]),
        ("shape", [2**40, 10]),
    ],
)
def test_unknown_values_of_a_layer(packed, key, value):
    edit(packed, lambda table: table["layers"]["q"].update({key: value}))
    with pytest.raises(ModelFileError, match=f"layer 'q' of the packed checkpoint has {key}"):
        open_source(packed)


def test_unknown_key_of_a_layer(packed):
    edit(packed, lambda table: table["layers"]["q"].update(zero_point=1))
    with pytest.raises(ModelFileError, match="zero_point"):
        open_source(packed)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quant", "w9"),
        ("quant", 2),
        ("scale", "column"),
        ("act", "int2"),
        ("terms", ["X"]),
        ("terms", [["U"]]),
        ("exempt", [1]),
        ("exempt", "lm_head"),
        ("stages_for", {"head": 9}),
        ("stages_for", []),
    ],
)
def test_unknown_values_of_the_config(packed, key, value):
    edit(packed, lambda table: table["config"].update({key: value}))
    with pytest.raises(ModelFileError, match="quantization_config"):
        open_source(packed)


@pytest.mark.parametrize("config", [None, [], {}, {"quant": "w2"}])
def test_config_with_other_keys(packed, config):
    edit(packed, lambda table: table.update(config=config))
    with pytest.raises(ModelFileError, match="expected the keys"):
        open_source(packed)


def test_code_shape_contradicts_the_config(packed):
    edit(packed, lambda table: table["layers"]["q"].update(shape=[16, 10], tile=[8, 5]))
    with pytest.raises(ModelFileError, match=r"'q.codes' has the shape \(2, 2, 6, 2\).*asks for"):
        open_source(packed)


def test_scale_shape_contradicts_the_config(packed):
    edit(packed, lambda table: table["layers"]["q"].update(scale="row", tile=[1, 5]))
    with pytest.raises(ModelFileError, match=r"'q.scales' has the shape"):
        open_source(packed)


def test_codes_of_another_dtype(packed):
    table = table_of(packed)
    rewrite(packed, table, lambda t: t.update({"q.codes": t["q.codes"].view(np.int8)}))
    with pytest.raises(UnsupportedError, match=r"'q.codes' is int8; allowed: uint8"):
        open_source(packed)


@pytest.mark.parametrize("suffix", ["codes", "scales"])
def test_missing_part_of_a_layer(packed, suffix):
    rewrite(packed, table_of(packed), lambda t: t.pop(f"q.{suffix}"))
    with pytest.raises(FairyError, match=f"no tensor 'q.{suffix}'"):
        open_source(packed)


def test_codes_that_no_layer_owns(packed):
    rewrite(packed, table_of(packed), lambda t: t.update({"x.codes": np.zeros(4, np.uint8)}))
    with pytest.raises(UnsupportedError, match=r"'x.codes' is uint8"):
        open_source(packed)


def test_layer_stored_twice(packed):
    rewrite(packed, table_of(packed), lambda t: t.update({"q.weight": weight(12, 10)}))
    with pytest.raises(ModelFileError, match="both as phase codes and as a dense weight"):
        open_source(packed)


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_scales_that_are_not_positive_and_finite(packed, bad):
    rewrite(packed, table_of(packed), lambda t: t["q.scales"].__setitem__((1, 0, 0, 0, 0), bad))
    source = open_source(packed)
    with pytest.raises(ModelFileError, match="layer 'q': phase scales must be finite and positive"):
        source.phase("q", QUANT)


def test_codes_in_padding_columns(packed):
    rewrite(packed, table_of(packed), lambda t: t["q.codes"].__setitem__((0, 0, 0, 1), 0b100))
    with pytest.raises(ModelFileError, match="'q' has codes in its padding columns"):
        open_source(packed).phase("q", QUANT)


def test_non_finite_dense_tensor(packed):
    rewrite(packed, table_of(packed), lambda t: t["norm.weight"].__setitem__(3, np.nan))
    with pytest.raises(FairyError, match=r"norm\.weight holds 1 non-finite"):
        open_source(packed).dense("norm.weight")


def test_config_of_another_checkpoint(packed):
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["source"] = {"sha256": {"x": "0"}}
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFileError, match="describe different packed checkpoints"):
        open_source(packed)


def test_header_without_the_description(packed):
    rewrite(packed, {}, lambda tensors: None)
    with pytest.raises(ModelFileError, match="describe different packed checkpoints"):
        open_source(packed)
