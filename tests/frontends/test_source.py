"""`open_source`: directories, hub ids, and what is said when there is neither."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from fairy_compile.errors import FairyError, ModelFileError
from fairy_compile.frontends import open_source


@pytest.fixture
def no_hub(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)


class FakeHub:
    """Stands in for the hub: serves a local directory and notes what it was asked for."""

    def __init__(self, directory):
        self.directory, self.patterns, self.revisions = directory, [], set()

    def __call__(self, repo_id, *, revision, allow_patterns, ignore_patterns):
        assert (repo_id, ignore_patterns) == ("org/name", ["*/*"])
        self.patterns.append(allow_patterns)
        self.revisions.add(revision)
        return str(self.directory)


def test_local_directory_wins_over_the_hub(make_model, monkeypatch, no_hub):
    directory = make_model()
    (directory.parent / "org").mkdir()
    directory.rename(directory.parent / "org" / "name")
    monkeypatch.chdir(directory.parent)
    assert open_source("org/name").kind == "huggingface"


def test_a_revision_of_a_directory_is_refused(make_model):
    with pytest.raises(
        FairyError, match=r"--revision v1 goes with a model of the Hugging Face hub"
    ):
        open_source(make_model(), revision="v1")


def test_an_empty_name_is_told():
    with pytest.raises(FairyError, match="the model's name is empty"):
        open_source("")


def test_hub_id_downloads_one_file_of_weights(make_model, monkeypatch):
    hub = FakeHub(make_model())
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    source = open_source("org/name", revision="v1")
    assert source.directory == hub.directory
    assert hub.revisions == {"v1"}
    assert {"*.json", "tokenizer.model", "merges.txt"} <= set(hub.patterns[0])
    assert hub.patterns[1:] == [["model.safetensors"]]


def test_hub_id_downloads_the_shards_of_the_index(make_model, monkeypatch):
    hub = FakeHub(make_model(shards=2))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    open_source("org/name")
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert hub.patterns[1:] == [shards]


def test_bin_files_are_downloaded_only_without_safetensors(make_model, monkeypatch):
    torch = pytest.importorskip("torch")
    hub = FakeHub(make_model())
    (hub.directory / "model.safetensors").unlink()
    torch.save({"a": torch.ones(2)}, hub.directory / "pytorch_model.bin")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert open_source("org/name").names() == ["a"]
    assert hub.patterns[1:] == [["model.safetensors"], ["pytorch_model.bin"]]


def test_hub_model_without_weights(make_model, monkeypatch):
    hub = FakeHub(make_model())
    (hub.directory / "model.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    with pytest.raises(ModelFileError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        open_source("org/name")


@pytest.mark.parametrize(
    "error",
    [
        OSError("no route to host\ntraceback"),
        ValueError("bad id"),
        LocalEntryNotFoundError("not cached"),
    ],
)
def test_hub_errors_become_one_sentence(tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FairyError) as caught:
        open_source("org/name")
    message = str(caught.value)
    assert str(tmp_path / "org" / "name") in message
    assert "hub answers: " in message
    assert "\n" not in message


@pytest.mark.parametrize("model", ["nothing", "./a/b", "/a/b", "a/b/c", "a\\b", "org/../x", ""])
def test_neither_directory_nor_hub_id(tmp_path, monkeypatch, no_hub, model):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FairyError, match=r"there is no directory .* is written org/name"):
        open_source(model)


def test_path_objects_never_go_to_the_hub(tmp_path, monkeypatch, no_hub):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FairyError, match="there is no directory"):
        open_source(Path("org/name"))


def test_a_file_is_not_a_model(make_model, no_hub):
    with pytest.raises(FairyError, match="is a file; give the model's directory"):
        open_source(make_model() / "model.safetensors")
