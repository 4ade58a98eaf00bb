import json
import shutil

from fairy_compile.models import FAMILIES
from fairy_compile.targets import target_names


def test_verify_says_what_is_good(cli, artifact):
    result = cli("verify", artifact[0])
    assert result.exit_code == 0
    assert "is good" in result.stdout.replace("\n", "")
    report = json.loads(cli("verify", artifact[0], "--json").stdout)
    assert report["hashed"]
    assert report["tensors"] > 8
    assert not json.loads(cli("verify", artifact[0], "--json", "--quick").stdout)["hashed"]


def test_verify_finds_a_changed_byte(cli, artifact, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(artifact[0], copy)
    library = copy / "model.so"
    content = bytearray(library.read_bytes())
    content[1000] ^= 1
    library.write_bytes(content)
    result = cli("verify", copy)
    assert result.exit_code == 2
    assert "model.so" in result.stderr
    assert result.stderr.count("\n") == 1
    # Loading verifies too: the damaged library is never opened.
    assert cli("run", copy, "-p", "x").exit_code == 2


def test_inspect_shows_layers_and_files(cli, artifact):
    result = cli("inspect", artifact[0])
    assert result.exit_code == 0
    assert "layers.0.mlp.gate_up_proj" in result.stdout
    assert "tensor-cache.json" in result.stdout
    assert json.loads(cli("inspect", artifact[0], "--json").stdout)["kind"] == "artifact"


def test_inspect_of_something_else(cli, tmp_path):
    result = cli("inspect", tmp_path)
    assert result.exit_code == 2
    assert "neither an artifact" in result.stderr


def test_targets_lists_every_target(cli):
    text = cli("targets").stdout
    assert all(name in text for name in target_names())
    targets = {t["name"]: t for t in json.loads(cli("targets", "--json").stdout)}
    assert targets["cpu"]["runs_here"] is True
    assert targets["cpu"]["features"]


def test_targets_lists_every_family_of_models(cli):
    text = cli("targets", "--models").stdout
    assert all(name in text for name in FAMILIES)
    models = {m["model_type"]: m for m in json.loads(cli("targets", "--models", "--json").stdout)}
    assert set(models) == set(FAMILIES)
    assert all(model["description"] for model in models.values())
