import numpy as np
import pytest

from fairy_compile import FairyError
from fairy_compile.evaluation import text as module
from fairy_compile.evaluation.text import read_text
from fairy_compile.runtime.text import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(source):
    return Tokenizer(source / "tokenizer.json")


def decoded(tokens, tokenizer):
    return tokenizer.decode(tokens.tolist())


def test_documents_are_joined_and_the_prefix_comes_once(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("def one")
    (tmp_path / "b.jsonl").write_text('{"body": "two"}\n{"body": "three"}\n')
    tokens, facts = read_text(tmp_path, tokenizer, [7], field="body")
    assert tokens[0] == 7
    assert decoded(tokens[1:], tokenizer) == "def one\n\ntwo\n\nthree"
    assert tokens.dtype == np.int32
    assert (facts.files, facts.split, facts.tokens, facts.truncated) == (
        2,
        None,
        len(tokens),
        False,
    )
    other, again = read_text(tmp_path, tokenizer, [7], field="body", join="|")
    assert decoded(other[1:], tokenizer) == "def one|two|three"
    assert again.tokens_sha256 != facts.tokens_sha256


@pytest.mark.parametrize("characters", [1, 8])
def test_most_tokens_are_the_first_of_the_whole_text(tokenizer, tmp_path, monkeypatch, characters):
    monkeypatch.setattr(module, "_CHARACTERS_A_TOKEN", characters)
    (tmp_path / "a.txt").write_text("def function(argument): return\n" * 200)
    whole, _ = read_text(tmp_path, tokenizer)
    part, facts = read_text(tmp_path, tokenizer, max_tokens=101)
    np.testing.assert_array_equal(part, whole[:101])
    assert facts.truncated
    everything, facts = read_text(tmp_path, tokenizer, max_tokens=10**6)
    np.testing.assert_array_equal(everything, whole)
    assert not facts.truncated


def test_one_split_of_a_data_set_is_read(tokenizer, tmp_path):
    for name in ("train-0.jsonl", "validation-0.jsonl", "test-0.jsonl"):
        (tmp_path / name).write_text(f'{{"text": "{name[:4]}"}}\n')
    tokens, facts = read_text(tmp_path, tokenizer)
    assert (decoded(tokens, tokenizer), facts.split) == ("test", "test")
    tokens, facts = read_text(tmp_path, tokenizer, split="train")
    assert (decoded(tokens, tokenizer), facts.split) == ("trai", "train")
    (tmp_path / "other.txt").write_text("more")
    assert read_text(tmp_path, tokenizer)[1].split is None
    (tmp_path / "test-0.jsonl").unlink()
    with pytest.raises(FairyError, match="no files of a split 'test'; it has train, validation"):
        read_text(tmp_path, tokenizer, split="test")
    with pytest.raises(FairyError, match="unknown --split 'tset'"):
        read_text(tmp_path, tokenizer, split="tset")


def test_several_data_sets_in_one_directory_are_told_apart(tokenizer, tmp_path):
    for folder in ("wikitext-2-raw-v1", "wikitext-103-raw-v1"):
        (tmp_path / folder).mkdir()
        for name in ("wiki.test.raw", "wiki.train.raw"):
            (tmp_path / folder / name).write_text("text")
    with pytest.raises(FairyError, match=r"several data sets .*wikitext-103-raw-v1, wikitext-2"):
        read_text(tmp_path, tokenizer)
    assert read_text(tmp_path / "wikitext-2-raw-v1", tokenizer)[1].split == "test"


def test_wikitext_as_the_hub_and_save_to_disk_have_it(tokenizer, tmp_path):
    """Empty rows count: the papers join all rows by a blank line."""
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["", " = A = \n", "", " b\n"]})
    joined = "\n\n".join(rows["text"])
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "README.md").write_text("about")
    for name in ("train", "test"):
        rows.to_parquet(str(hub / f"{name}-00000-of-00001.parquet"))
    saved = tmp_path / "saved"
    datasets.DatasetDict(train=rows, validation=rows).save_to_disk(str(saved))
    for path, split in ((hub, "test"), (saved, "validation")):
        tokens, facts = read_text(path, tokenizer)
        assert decoded(tokens, tokenizer) == joined
        assert facts.split == split


def test_empty_text_and_bad_limit(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(FairyError, match="is empty"):
        read_text(tmp_path, tokenizer)
    with pytest.raises(FairyError, match="--max-tokens is 1"):
        read_text(tmp_path, tokenizer, max_tokens=1)
    with pytest.raises(FairyError, match="there is no data"):
        read_text(tmp_path / "b", tokenizer)
