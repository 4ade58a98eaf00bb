import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fairy_compile.errors import FairyError, ModelFileError
from fairy_compile.runtime.text import StopFilter, TextStream, Tokenizer

from .tiny_tokenizers import byte_fallback_tokenizer, byte_level_tokenizer


def save(fast, directory):
    path = directory / "tokenizer.json"
    fast.save(str(path))
    return Tokenizer(path)


@pytest.fixture(scope="module", params=[byte_level_tokenizer, byte_fallback_tokenizer])
def tokenizer(request, tmp_path_factory):
    return save(request.param(), tmp_path_factory.mktemp("tokenizer"))


def pieces_of(tokenizer, tokens, context=()):
    stream = TextStream(tokenizer, context)
    return [stream.push(token) for token in tokens] + [stream.finish()]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
texts |= st.text("the \n é🙂你\ufffd▁", max_size=30)


@settings(max_examples=300, deadline=None)
@given(text=texts)
@example(text="  two  spaces  ")
@example(text="🙂🙂é")
@example(text="\ufffd ends \ufffd")
def test_pieces_join_to_the_whole_decoding(tokenizer, text):
    tokens = tokenizer.encode(text, special=False)
    assert "".join(pieces_of(tokenizer, tokens)) == tokenizer.decode(tokens)


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(0, 255), max_size=30))
def test_random_bytes_join_to_the_whole_decoding(tokens):
    # Any token list, also one that is no text: for byte-level tokenizers even that is exact.
    assert "".join(pieces_of(BYTE_LEVEL, tokens)) == BYTE_LEVEL.decode(tokens)


class _ByteLevel:
    def __init__(self):
        self.fast = byte_level_tokenizer()

    def decode(self, tokens):
        return self.fast.decode(list(tokens), skip_special_tokens=True)


BYTE_LEVEL = _ByteLevel()


@settings(max_examples=100, deadline=None)
@given(text=texts, cut=st.integers(1, 20))
def test_a_continuation_joins_its_context(tokenizer, text, cut):
    tokens = tokenizer.encode(text, special=False)
    context, rest = tokens[:cut], tokens[cut:]
    whole, before = tokenizer.decode(tokens), tokenizer.decode(context)
    if before.endswith("\ufffd"):  # cut inside a character
        return
    assert before + "".join(pieces_of(tokenizer, rest, context)) == whole


def test_no_piece_ends_inside_a_character(tokenizer):
    tokens = tokenizer.encode("a🙂b你c", special=False)
    pieces = [p for p in pieces_of(tokenizer, tokens) if p]
    assert "".join(pieces).strip() == "a🙂b你c"
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(tokens) > len(pieces)


def test_spaces_between_words_survive_and_the_prompts_too(tmp_path):
    tokenizer = save(byte_fallback_tokenizer(), tmp_path)
    tokens = tokenizer.encode("the the the", special=False)
    assert "".join(pieces_of(tokenizer, tokens)) == "the the the"
    assert "".join(pieces_of(tokenizer, tokens[1:], context=tokens[:1])) == " the the"


def test_bytes_that_are_no_character_come_out_at_the_end(tmp_path):
    tokenizer = save(byte_fallback_tokenizer(), tmp_path)
    euro = [tokenizer.id_of(f"<0x{b:02X}>") for b in "€".encode()]
    assert pieces_of(tokenizer, [*euro, euro[0]]) == ["", "", "€", "", "\ufffd"]


def test_special_tokens_have_no_text(tmp_path):
    tokenizer = save(byte_level_tokenizer(), tmp_path)
    tokens = [tokenizer.id_of("<|user|>"), *tokenizer.encode("hi", special=False), 0]
    assert "".join(pieces_of(tokenizer, tokens)) == "hi"


def test_tokenizer_errors_are_sentences(tmp_path):
    with pytest.raises(ModelFileError, match="is missing"):
        Tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ModelFileError, match="not a valid tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json")
    tokenizer = save(byte_level_tokenizer(), tmp_path)
    with pytest.raises(FairyError, match="not valid Unicode"):
        tokenizer.encode("\ud800")
    with pytest.raises(FairyError, match="expected str"):
        tokenizer.encode(b"bytes")


def filtered(stops, pieces):
    stop = StopFilter(stops)
    shown = [stop.push(piece) for piece in pieces]
    return shown if stop.stopped else [*shown, stop.finish()], stop.stopped


def test_stop_string_across_pieces_is_never_shown():
    shown, stopped = filtered(["</end>"], ["answer <", "/e", "nd", "> more"])
    assert shown == ["answer ", "", "", ""]
    assert stopped


def test_what_only_looked_like_a_stop_string_is_shown():
    shown, stopped = filtered(["</end>"], ["a </", "em", "></"])
    assert shown == ["a ", "</em", ">", "</"]
    assert not stopped


def test_nothing_follows_a_stop_string():
    stop = StopFilter("\n")
    assert [stop.push("one\ntwo"), stop.push("three"), stop.finish()] == ["one", "", ""]


@given(
    text=st.text("ab\n", max_size=30),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=6),
)
def test_stop_filter_does_not_depend_on_pieces(text, stops, cuts):
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
    shown, stopped = filtered(stops, pieces)
    letters, letters_stopped = filtered(stops, list(text))
    assert "".join(shown) == "".join(letters)
    assert stopped == letters_stopped == any(stop in text for stop in stops)
    assert not any(stop in "".join(shown) for stop in stops)
    assert text.startswith("".join(shown))


@pytest.mark.parametrize("stop", ["", 3])
def test_bad_stop_strings_are_refused(stop):
    with pytest.raises(FairyError, match="a stop string is"):
        StopFilter([stop])
