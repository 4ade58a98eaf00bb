import json

import pytest


def test_build_prints_a_table_of_layers_and_writes_the_artifact(artifact):
    directory, result = artifact
    assert "layers.0.self_attn.qkv_proj" in result.stdout
    assert "lm_head" in result.stdout
    assert f"wrote {directory}" in result.stdout.replace("\n", "")
    names = {path.name for path in directory.iterdir()}
    assert {"fairy.json", "mlc-chat-config.json", "tensor-cache.json", "tokenizer.json"} <= names


def test_build_refuses_to_overwrite(cli, checkpoint, artifact):
    result = cli("build", checkpoint, "-o", artifact[0])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: the output")
    assert result.stderr.count("\n") == 1
    assert "--force" in result.stderr


def test_dry_run_writes_nothing(cli, checkpoint, tmp_path):
    result = cli(
        "build", checkpoint, "-o", tmp_path / "out", "--dry-run", "--quant", "w1", "--scale", "row"
    )
    assert result.exit_code == 0
    assert "nothing was written" in result.stdout
    assert not list(tmp_path.iterdir())


def test_options_reach_the_compiler(cli, checkpoint):
    options = ["--quant", "w1", "--scale", "row", "--act", "float", "--exempt", "lm_head"]
    sizes = ["--context", "64", "--prefill-chunk", "16", "--max-batch", "2"]
    result = cli("build", checkpoint, "--dry-run", "--json", *options, *sizes)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    layers = {layer["name"]: layer for layer in report["layers"]}
    down = layers["model.layers.0.mlp.down_proj"]
    assert (down["stages"], down["scale"], down["act"]) == (1, "row", "float")
    assert layers["lm_head"]["stages"] == 0
    assert report["sizes"] == {
        "context": 64,
        "prefill_chunk": 16,
        "max_batch": 2,
        "kv_dtype": "float32",
        "act_dtype": "float32",
    }


@pytest.mark.parametrize("verb", ["build", "convert"])
def test_patterns_that_match_no_layer_are_told(cli, checkpoint, tmp_path, verb):
    output = [verb, checkpoint, "-o", tmp_path / "out", "--dry-run", "--json"]
    wrong = ["--exempt", "q_proj", "--layer-quant", "head=w3"]
    right = ["--exempt", "*.q_proj", "--layer-quant", "lm_head=w3"]
    notes = json.loads(cli(*output, *wrong, *right).stdout)["notes"]
    told = [note for note in notes if "matches no linear layer" in note]
    assert [note.split(" matches")[0] for note in told] == [
        "--exempt 'q_proj'",
        "--layer-quant 'head'",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "cpuu", "-o", "x"], "unknown target 'cpuu'"),
        (["--quant", "w9", "-o", "x"], "unknown --quant 'w9'"),
        (["--act", "int4", "-o", "x"], "unknown --act 'int4'"),
        (["--act-dtype", "bfloat16", "-o", "x"], "--act-dtype bfloat16: target cpu computes in"),
        (["--context", "0", "-o", "x"], "--context is 0"),
        (["--debug-dump", __file__, "-o", "x"], "is a file; name a directory"),
        ([], "give it with -o DIR"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    cli, checkpoint, tmp_path, monkeypatch, options, message
):
    monkeypatch.chdir(tmp_path)
    result = cli("build", checkpoint, *options)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


def test_missing_model(cli, tmp_path):
    result = cli("build", tmp_path / "nothing", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "no directory" in result.stderr


@pytest.mark.parametrize("verb", ["build", "convert"])
def test_an_artifact_as_the_model_is_told(cli, artifact, tmp_path, verb):
    result = cli(verb, artifact[0], "-o", tmp_path / "out")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "is an artifact already, built for target cpu; use it" in result.stderr
    assert "or give the model it was built from (tiny)" in result.stderr
