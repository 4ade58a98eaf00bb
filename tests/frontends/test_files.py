"""File names, links and JSON of untrusted model directories."""

from pathlib import Path

import pytest

from fairy_compile.errors import ModelFileError
from fairy_compile.frontends import files


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/b", "a\\b", "..", ".", "", "C:x", "a\0b", "a\nb", 3, None]
)
def test_names_that_leave_the_directory(name):
    with pytest.raises(ModelFileError, match="plain file names"):
        files.plain_file_name(name, Path("index.json"))


def test_missing_file_is_none(tmp_path):
    assert files.member(tmp_path, "config.json") is None


def test_link_inside_the_directory(tmp_path):
    (tmp_path / "real.json").write_text("{}")
    (tmp_path / "config.json").symlink_to("real.json")
    assert files.read_config(tmp_path) == {}


def test_link_out_of_the_directory(tmp_path):
    (tmp_path / "secret").write_text("{}")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").symlink_to("../secret")
    with pytest.raises(ModelFileError, match=r"symbolic link to .*secret, outside"):
        files.read_config(model)


def test_dangling_link(tmp_path):
    (tmp_path / "config.json").symlink_to("gone")
    with pytest.raises(ModelFileError, match="not a regular file"):
        files.read_config(tmp_path)


def test_links_of_a_hub_snapshot(tmp_path):
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "123").write_text('{"a": 1}')
    (snapshot / "config.json").symlink_to("../../blobs/123")
    assert files.read_config(snapshot) == {"a": 1}
    (repository / "refs").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../refs")
    with pytest.raises(ModelFileError, match="outside"):
        files.member(snapshot, "tokenizer.json")


def test_directory_instead_of_a_file(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelFileError, match="not a regular file"):
        files.read_config(tmp_path)


def test_missing_config(tmp_path):
    with pytest.raises(ModelFileError, match=r"has no config\.json"):
        files.read_config(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "{'a': 1}", '{"a": 1, "a": 2}', "[" * 100_000])
def test_invalid_json(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelFileError, match=r"config\.json is not valid JSON"):
        files.read_config(tmp_path)


def test_json_that_is_not_an_object(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ModelFileError, match="JSON list; expected an object"):
        files.read_config(tmp_path)


def test_config_over_the_limit(tmp_path):
    (tmp_path / "config.json").write_text('{"a": "' + "x" * files.CONFIG_LIMIT + '"}')
    with pytest.raises(ModelFileError, match=f"allowed: at most {files.CONFIG_LIMIT}"):
        files.read_config(tmp_path)
