from importlib import import_module
from types import SimpleNamespace

import pytest


def test_the_next_command_can_be_copied(cli, tmp_path, monkeypatch):
    report = {"notes": (), "bytes": 1, "model_id": "m", "model_lib": "fairy_m"}
    report["output"] = tmp_path / "my app"
    module = import_module("fairy_compile.artifact.package")
    monkeypatch.setattr(module, "package", lambda *_, **__: SimpleNamespace(**report))
    result = cli("package", tmp_path, "--for", "ios", "-o", report["output"])
    assert f"cd '{report['output']}' && mlc_llm package --package-config" in result.stdout


def test_a_package_needs_an_artifact_for_phones(cli, artifact, tmp_path):
    result = cli("package", artifact[0], "--for", "ios", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "was built for cpu; an app for ios links iphone" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--for", "ios"], "give it with -o DIR"),
        (["--for", "symbian", "-o", "x"], "symbian"),
        (["-o", "x"], "--for"),
    ],
)
def test_wrong_options_are_refused(cli, tmp_path, options, message):
    result = cli("package", tmp_path, *options)
    assert result.exit_code == 2
    assert message in result.stderr
