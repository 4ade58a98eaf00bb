from __future__ import annotations

import gzip
import json
import os

import pytest

from fairy_compile import FairyError
from fairy_compile import documents as module
from fairy_compile.documents import data_files, documents


def read(path, field="text"):
    return ["".join(document) for file in data_files(path) for document in documents(file, field)]


def test_text_files_of_a_directory_in_order(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/c.jsonl").write_text('{"text": "third"}\n\n{"text": "fourth"}\n')
    (tmp_path / "notes.pdf").write_bytes(b"\x00")
    assert read(tmp_path) == ["first", "second", "third", "fourth"]


def test_a_long_file_comes_in_pieces_that_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PIECE_BYTES", 10)
    content = "".join(f"line {i}\r\n" for i in range(20)) + "end"
    (tmp_path / "long.txt").write_text(content, newline="")
    (document,) = documents(tmp_path / "long.txt")
    pieces = list(document)
    assert len(pieces) > 5
    assert "".join(pieces) == content


def test_byte_order_marks_are_no_text(tmp_path):
    """As editors of Windows put them in front."""
    (tmp_path / "a.txt").write_text("first", encoding="utf-8-sig")
    (tmp_path / "b.jsonl").write_text('{"text": "second"}\n', encoding="utf-8-sig")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt", encoding="utf-8-sig") as file:
        file.write('{"text": "third"}\n')
    assert read(tmp_path) == ["first", "second", "third"]


def test_parquet_and_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"body": ["one", "", "two"], "other": [1, 2, 3]})
    dataset.to_parquet(str(tmp_path / "d.parquet"))
    assert read(tmp_path / "d.parquet", "body") == ["one", "two"]
    dataset.save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path / "saved", "body") == ["one", "two"]
    datasets.DatasetDict(train=dataset).save_to_disk(str(tmp_path / "dict"))
    assert read(tmp_path / "dict", "body") == ["one", "two"]
    datasets.DatasetDict(test=dataset).save_to_disk(str(tmp_path / "test_only"))
    rows = documents(tmp_path / "test_only", "body", split="test", keep_empty=True)
    assert ["".join(row) for row in rows] == ["one", "", "two"]
    for path, words in (
        ("saved", "body, other"),
        ("d.parquet", "body, other"),
        ("test_only", "none called 'train'"),
    ):
        with pytest.raises(FairyError, match=words):
            read(tmp_path / path)
    for path in ("saved", "d.parquet"):
        with pytest.raises(FairyError, match=r"column 'other' of .* holds 1, no text"):
            read(tmp_path / path, "other")


def test_arrow_streams_as_the_datasets_cache_holds_them(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"text": ["one", None, "two"]})
    with pyarrow.ipc.new_stream(tmp_path / "w-test.arrow", table.schema) as stream:
        stream.write_table(table)
    (tmp_path / "dataset_info.json").write_text("{}")
    assert read(tmp_path) == ["one", "two"]


def test_compressed_json_lines(tmp_path):
    with gzip.open(tmp_path / "c4-validation.json.gz", "wt") as out:
        out.write('{"text": "one"}\n{"text": "two"}\n')
    assert read(tmp_path) == ["one", "two"]


def test_what_describes_a_dataset_is_not_its_text(tmp_path):
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "loader.py").write_text("pass")
    assert read(tmp_path) == ["about", "pass"]
    with gzip.open(tmp_path / "data.jsonl.gz", "wt") as out:
        out.write('{"text": "data"}\n')
    assert read(tmp_path) == ["data"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text', "line 2 is not JSON"),
        ("a.jsonl", json.dumps({"body": "x"}).encode(), "no text under 'text'; it has body"),
        ("a.jsonl", b"[1]", "it has no keys"),
        ("a.jsonl", b'{"text": 3}', "no text under"),
        ("a.jsonl", b'{"text": null}', "no text under 'text' but null"),
        ("a.jsonl.gz", b"plain", "not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}', mtime=0)[:-9], "not a whole gzip file"),
        ("a.parquet", b"PAR1", "not a readable parquet file"),
        ("a.arrow", b"ARROW1", "not a readable Arrow stream"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, words):
    if name.endswith(("parquet", "arrow")):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FairyError, match=words) as caught:
        read(tmp_path)
    assert name in str(caught.value)


def test_missing_and_useless_paths(tmp_path):
    with pytest.raises(FairyError, match="there is no data"):
        data_files(tmp_path / "nothing")
    (tmp_path / "a.pdf").write_text("")
    with pytest.raises(FairyError, match="holds no data"):
        data_files(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_and_devices_are_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(FairyError, match=r"pipe\.txt is a pipe, which is not read; give a text"):
        data_files(tmp_path / "pipe.txt")
    with pytest.raises(FairyError, match="/dev/null is a device or socket, which is not read"):
        data_files("/dev/null")


def test_an_empty_path_is_not_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("first")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FairyError, match="the data is an empty text; give a text, jsonl"):
        data_files("")
    assert read(".") == ["first"]


def test_what_the_system_does_not_give_is_told(tmp_path, monkeypatch):
    """As of files of other users; tests may run as one who reads all."""
    with pytest.raises(FairyError, match=r"cannot read the data .*: File name too long"):
        data_files(tmp_path / ("x" * 300))
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.jsonl").write_text('{"text": "second"}')

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    for name in ("a.txt", "b.jsonl"):
        with pytest.raises(FairyError, match=f"cannot read the data .*{name}: Permission denied"):
            read(tmp_path / name)
    monkeypatch.setattr("pathlib.Path.iterdir", refuse)
    with pytest.raises(FairyError, match=r"cannot read the data .*: Permission denied"):
        data_files(tmp_path)


def test_damaged_datasets_are_told(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(FairyError, match=r"the dataset .* cannot be loaded: .*; save it again"):
        read(tmp_path)
