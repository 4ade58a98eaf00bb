import numpy as np
import pytest

from fairy_compile.runtime.text import Tokenizer
from fairy_compile.serve.logprobs import token_logprob
from fairy_compile.serve.token_bytes import TokenBytes

from .conftest import MODEL


def test_logprobs_are_those_of_a_softmax():
    logits = np.array([1.0, 3.0, 2.0, 3.0], np.float32)
    log_p = logits - np.log(np.exp(logits).sum())
    entry = token_logprob(logits, 2, 3)
    assert entry.logprob == pytest.approx(log_p[2])
    assert [token for token, _ in entry.top] == [1, 3, 2]  # equal ones by id
    assert token_logprob(logits, 0, 0).top == ()
    assert len(token_logprob(logits, 0, 4).top) == 4


def test_bytes_of_tokens_join_to_the_text():
    tokenizer = Tokenizer(MODEL / "tokenizer.json")
    tokens = TokenBytes(tokenizer, {"tokenizer_info": {"token_postproc_method": "byte_level"}})
    text = "def f():\n    return 'ü €😀'\n"
    ids = tokenizer.encode(text, special=False)
    assert b"".join(map(tokens.bytes_of, ids)) == text.encode()
    assert tokens.text_of(0) == "<|begin|>"


def test_bytes_of_sentencepiece_tokens(tmp_path):
    from tokenizers import Tokenizer as Fast
    from tokenizers import models

    vocabulary = {"<unk>": 0, "▁Hello": 1, "<0xE2>": 2, "ü": 3}
    path = tmp_path / "tokenizer.json"
    Fast(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)).save(str(path))
    tokens = TokenBytes(Tokenizer(path), {})
    assert [tokens.bytes_of(i) for i in (1, 2, 3)] == [b" Hello", b"\xe2", "ü".encode()]
    assert tokens.text_of(2) == "\N{REPLACEMENT CHARACTER}"
