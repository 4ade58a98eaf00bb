"""Which method a checkpoint gets, by what it says of itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fairy_compile.config import QuantConfig
from fairy_compile.errors import ModelFileError, UnsupportedError
from fairy_compile.frontends import open_source
from fairy_compile.frontends.convert import convert
from fairy_compile.frontends.method import resolve


def change(directory: Path, **entries: object) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return directory


def latents(**changes: object) -> dict[str, object]:
    config = QuantConfig("w1", scale="row", stages_for={"lm_head": 2}, exempt=("*odd*",))
    table = {"quant_method": "fairy2i", "latents": True, "config": config.to_json()}
    return table | changes


def test_an_ordinary_checkpoint_is_fitted_and_its_head_gets_three_stages(make_model):
    used, note = open_source(make_model()).settle(QuantConfig("w2"))
    assert (used.method, used.stages("lm_head"), used.stages("q_proj")) == ("alternating", 3, 2)
    assert "use --method phase" in note
    assert "--layer-quant lm_head=w2 overrides" in note


@pytest.mark.parametrize(
    "asked",
    [
        QuantConfig("w2", method="phase"),
        QuantConfig("w2", stages_for={"lm_*": 2}),
        QuantConfig("w2", exempt=("lm_head",)),
        QuantConfig("w3"),
        QuantConfig("w4"),
    ],
)
def test_the_head_is_left_alone_where_something_speaks_against(asked):
    assert resolve(asked, None).stages_for == asked.stages_for


def test_settled_settings_stay():
    used = resolve(QuantConfig("w2"), None)
    assert resolve(used, None) == used
    assert resolve(resolve(QuantConfig(), "it says so"), None).method == "phase"


@pytest.mark.parametrize("sign", ["directory", "_name_or_path", "README.md"])
def test_models_named_after_the_rule_get_it(make_model, sign):
    directory = make_model(None, "Fairy2i-W2" if sign == "directory" else "model")
    if sign == "_name_or_path":
        change(directory, _name_or_path="PKU-DS-LAB/Fairy2i-W2")
    elif sign == "README.md":
        (directory / "README.md").write_text("---\nlicense: mit\n---\n# fairy2i of something\n")
    used, note = open_source(directory).settle(QuantConfig("w2"))
    assert (used.method, dict(used.stages_for)) == ("phase", {})
    assert "named" in note
    assert "--method alternating overrides" in note
    assert open_source(directory).settle(QuantConfig(method="alternating"))[0].method != "phase"


def test_master_weights_bring_their_settings(make_model):
    directory = change(make_model(), quantization_config=latents())
    used, note = open_source(directory).settle(QuantConfig("w2", act="float"))
    assert (used.quant, used.scale, used.method, used.act) == ("w1", "row", "phase", "float")
    assert (dict(used.stages_for), used.exempt) == ({"lm_head": 2}, ("*odd*",))
    assert "master weights" in note
    assert "trained for w1, scales per row, which they keep" in note
    assert open_source(directory).settle(QuantConfig(exempt=("a",)))[0].exempt == ("a",)


def test_another_method_overrides_what_master_weights_say(make_model):
    directory = change(make_model(), quantization_config=latents())
    asked = QuantConfig("w2", scale="tile64", method="alternating", stages_for={"lm_head": 4})
    used, note = open_source(directory).settle(asked)
    assert used == asked
    assert note == "method alternating, as asked for"
    gptq = open_source(directory).settle(QuantConfig(method="gptq"), calibrated=True)[0]
    assert (gptq.method, gptq.quant) == ("gptq", "w2")


def test_master_weights_without_settings_take_those_asked_for(make_model):
    table = latents()
    del table["config"]
    directory = change(make_model(), quantization_config=table)
    used, _ = open_source(directory).settle(QuantConfig("w3"))
    assert (used.quant, used.method) == ("w3", "phase")


@pytest.mark.parametrize(
    ("table", "error", "words"),
    [
        ({"quant_method": "gptq"}, UnsupportedError, "already quantised by 'gptq'"),
        (latents(latents=False), UnsupportedError, "latents = False"),
        (latents(config={"quant": "w2"}), ModelFileError, "expected the keys"),
        (latents(config=QuantConfig().to_json() | {"quant": "w9"}), ModelFileError, "w9"),
    ],
)
def test_other_tables_are_refused(make_model, table, error, words):
    directory = change(make_model(), quantization_config=table)
    with pytest.raises(error, match=words):
        open_source(directory)


def test_convert_uses_and_tells_the_method(make_model, tmp_path):
    report = convert(make_model(), tmp_path / "packed", quant="w2")
    assert report.notes[0].startswith("method alternating")
    layers = {layer.name: layer for layer in report.layers}
    assert "alternating" in layers["model.layers.0.self_attn.q_proj"].reason
    assert layers["lm_head"].stages == 3
    plain = convert(make_model(None, "again"), tmp_path / "p", quant=QuantConfig(method="phase"))
    for layer in plain.layers:
        if layer.phase:
            assert layers[layer.name].nmse <= layer.nmse
    assert open_source(tmp_path / "packed").settle(QuantConfig("w1"))[0].method == "alternating"
