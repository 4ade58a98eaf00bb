from __future__ import annotations

import re

import pytest

from fairy_compile.artifact import Manifest, Source
from fairy_compile.errors import ModelFileError


def test_round_trip(artifact, tmp_path):
    manifest = Manifest.load(artifact.directory)
    manifest.write(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert manifest.params[1].unused_bits == 0xF0
    assert manifest.layers[0].shape == (4, 8)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", manifest.created)


@pytest.mark.parametrize("version", [0, 2, "1", 1.0, True, None])
def test_unknown_format_version(artifact, version):
    artifact.edit_manifest(lambda m: m.update(format_version=version))
    with pytest.raises(ModelFileError, match="format_version"):
        Manifest.load(artifact.directory)


def test_every_key_is_required(artifact):
    good = artifact.read()
    for key in good.keys() - {"system_lib"}:  # which earlier versions did not write
        with pytest.raises(ModelFileError, match=key):
            Manifest.from_json({k: v for k, v in good.items() if k != key})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format_version",), 1.0),
        (("source", "files", "config.json"), 3),
        (("target", "features"), "avx2"),
        (("target", "features"), [1]),
        (("files", "lib.so", "bytes"), "7"),
        (("layers", 0, "stages"), 2.5),
        (("layers", 0, "shape"), [4, None]),
        (("params", 0, "role"), None),
        (("functions", "embed"), {}),
        (("model",), []),
    ],
)
def test_wrong_types(artifact, path, value):
    manifest = artifact.read()
    place = manifest
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ModelFileError, match="; expected "):
        Manifest.from_json(manifest)


@pytest.mark.parametrize("name", ["/home/me/model", "~/model", "C:\\model", "\\\\server\\model"])
def test_source_name_does_not_give_away_paths(name):
    with pytest.raises(ModelFileError, match="last part"):
        Source("huggingface", name)


def test_hub_id_is_a_source_name():
    assert Source("huggingface", "PKU-DS-LAB/Fairy2i-W2").name.count("/") == 1
