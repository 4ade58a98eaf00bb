import json

import pytest

from fairy_compile.bench.save import default_name, result_paths, save
from fairy_compile.errors import FairyError
from tests.bench.results import COMPARISON, RESULT


def test_files_of_a_result(tmp_path):
    paths = result_paths(tmp_path / "new", "name", comparison=False, force=False)
    save(RESULT, paths)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["name.json", "name.md"]
    assert json.loads(paths[0].read_text())["threads"] == 2
    with pytest.raises(FairyError, match=r"name.json exists; .* --force"):
        result_paths(tmp_path / "new", "name", comparison=False, force=False)
    assert result_paths(tmp_path / "new", "name", comparison=False, force=True) == paths


def test_a_comparison_has_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    paths = result_paths(tmp_path, "a-vs-b", comparison=True, force=False)
    save(COMPARISON, paths)
    picture = paths[2].read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("name", ["", "a/b", "..", "-x", "a" * 200])
def test_names_that_are_no_file_names(tmp_path, name):
    with pytest.raises(FairyError, match="--name is"):
        result_paths(tmp_path, name, comparison=False, force=False)


def test_places_that_cannot_be_written_are_told_before_the_measurement(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(FairyError, match="file is a file; name a directory"):
            result_paths(place, "name", comparison=False, force=False)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(FairyError, match="cannot be written; name another directory"):
        result_paths(tmp_path / "new", "name", comparison=False, force=False)


def test_default_names_are_file_names():
    assert default_name("PKU-DS-LAB/Fairy2i W2", comparison=True) == (
        "PKU-DS-LAB-Fairy2i-W2-vs-llama.cpp"
    )
    assert default_name("../..", comparison=False) == "model"
