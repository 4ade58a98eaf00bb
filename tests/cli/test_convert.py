import json


def test_convert_then_inspect(cli, checkpoint, tmp_path):
    result = cli("convert", checkpoint, "-o", tmp_path / "packed", "--quant", "w1")
    assert result.exit_code == 0, result.stderr
    assert "relative squared error" in result.stdout
    assert "wrote" in result.stdout
    shown = cli("inspect", tmp_path / "packed", "--json")
    kind = json.loads(shown.stdout)
    assert kind["kind"] == "packed checkpoint"
    assert "w1" in kind["header"]["quantisation"]
    text = cli("inspect", tmp_path / "packed").stdout
    assert "layers.0.mlp.down_proj" in text


def test_json_report(cli, checkpoint, tmp_path):
    result = cli(
        "convert", checkpoint, "-o", tmp_path / "p", "--dry-run", "--json", "--scale", "row"
    )
    report = json.loads(result.stdout)
    assert report["dry_run"]
    assert len(report["layers"]) >= 8
    assert not (tmp_path / "p").exists()


def test_output_is_asked_for(cli, checkpoint):
    result = cli("convert", checkpoint)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "-o DIR" in result.stderr


def test_wrong_dense_dtype(cli, checkpoint, tmp_path):
    result = cli("convert", checkpoint, "-o", tmp_path / "p", "--dense-dtype", "int3")
    assert result.exit_code == 2
    assert "allowed: float16" in result.stderr
