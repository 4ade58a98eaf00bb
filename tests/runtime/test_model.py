import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fairy_compile.artifact.manifest import LayerEntry
from fairy_compile.errors import FairyError
from fairy_compile.runtime import Model


def test_logits_of_a_prompt(model):
    logits = model.logits(range(4, 30))
    assert logits.dtype == np.float32
    assert logits.shape == (26, 320)
    np.testing.assert_array_equal(logits, model.logits(list(range(4, 30))))
    assert model.engine.cache.sequences == []


def greedy_by_hand(model, tokens, count):
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(np.argmax(model.logits(tokens)[-1])))
    return tokens


def test_greedy_text_equals_repeated_prefill(model):
    prompt = model.tokenizer.encode("def add(")
    generation = model.generate("def add(", 12, temperature=0.0, stream=True)
    text = generation.read()
    assert generation.finish_reason == "length"
    assert generation.tokens == greedy_by_hand(model, prompt, 12)[len(prompt) :]
    assert text == model.tokenizer.decode(generation.tokens) == generation.text
    assert model.generate(prompt, 12, temperature=0.0) == text


def test_streamed_pieces_join_to_the_text(model):
    options = {"max_tokens": 20, "temperature": 0.0}
    pieces = list(model.generate("for i in", stream=True, **options))
    assert len(pieces) > 1
    assert "" not in pieces
    assert "".join(pieces) == model.generate("for i in", **options)


def test_an_answer_that_is_left_early_frees_its_sequence(model):
    for _ in range(model.engine.cache.max_sequences + 1):
        for _piece in model.generate("abc", 50, temperature=0.0, stream=True):
            break
    assert model.engine.cache.sequences == []


def test_same_seed_same_text(model):
    def text(seed):
        return model.generate("x", 20, temperature=1.0, seed=seed)

    assert text(5) == text(5)
    assert text(5) != text(6)


def test_stop_string_ends_the_text_before_it(model):
    text = model.generate("def", 30, temperature=0.0)
    stop = text[len(text) // 2 :][:3]
    generation = model.generate("def", 30, temperature=0.0, stop=[stop], stream=True)
    assert generation.read() == text[: text.index(stop)]
    assert generation.finish_reason == "stop"


def test_stop_token_ends_the_text(model):
    tokens = greedy_by_hand(model, [5, 6], 6)[2:]
    model.stop_tokens = frozenset([tokens[4]])
    generation = model.generate([5, 6], 30, temperature=0.0, stream=True)
    generation.read()
    assert generation.finish_reason == "stop"
    assert generation.tokens == tokens[: tokens.index(tokens[4])]


def test_end_tokens_come_from_the_config(model):
    assert model.stop_tokens == {0}
    assert model.sampling.temperature == 0.8
    assert model.sampling.top_p == 0.95


def test_a_full_context_ends_the_text(model):
    model.stop_tokens = frozenset()
    generation = model.generate(range(1, 61), 100, temperature=0.0, stream=True)
    generation.read()
    assert generation.finish_reason == "context"
    assert len(generation.tokens) == 5  # four fit the cache, the last is only drawn
    with pytest.raises(FairyError, match=r"65 tokens.*holds 64"):
        model.generate(range(1, 66))
    assert model.engine.cache.sequences == []


def test_a_stream_given_up_frees_its_sequence(model):
    generation = model.generate("abc", 50, temperature=0.0, stream=True)
    assert model.engine.cache.sequences == []
    first = next(generation)
    assert len(model.engine.cache.sequences) == 1
    generation.close()
    assert generation.finish_reason == "cancelled"
    assert generation.text == first
    assert model.engine.cache.sequences == []
    assert list(generation) == []


def test_streams_may_interleave(model):
    def tokens(prompt):
        generation = model.generate(prompt, 8, temperature=0.0, stream=True)
        generation.read()
        return generation.tokens

    alone = tokens("one"), tokens("two")
    first = model.generate("one", 8, temperature=0.0, stream=True)
    second = model.generate("two", 8, temperature=0.0, stream=True)
    running = [first, second]
    while running:
        running = [g for g in running if next(g, None) is not None]
    assert (first.tokens, second.tokens) == alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"stop": [""]}, "a stop string is ''"),
        ({"logit_bias": {999: 1.0}}, "logit_bias names token 999"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias names the token '5'"),
        ({"logit_bias": [5]}, r"logit_bias is \[5\]"),
        ({"stop": 5}, "stop is 5; allowed: a string, or a list of strings"),
    ],
)
def test_bad_options_are_sentences_and_leak_nothing(model, options, message):
    with pytest.raises(FairyError, match=message):
        model.generate("x", **options)
    assert model.engine.cache.sequences == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "the prompt is None; allowed: text, or a list of tokens"),
        (b"ab", "the prompt is b'ab'; allowed: text"),
        (5, "the prompt is 5"),
        ([1.5], "flat sequence of integers"),
        (["a"], "flat sequence of integers"),
        ([[1, 2]], "flat sequence of integers"),
    ],
)
def test_a_prompt_of_another_kind_is_a_sentence(model, prompt, message):
    with pytest.raises(FairyError, match=message):
        model.generate(prompt)
    assert model.engine.cache.sequences == []


def test_empty_prompt_is_a_sentence(model):
    with pytest.raises(FairyError, match="no tokens to run"):
        model.generate("")


def test_chat_renders_and_stops_at_the_templates_strings(model):
    model.template.source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": "def add("}]
    text = model.chat(messages, 20, temperature=0.0)
    assert text == model.generate("def add(", 20, temperature=0.0)
    model.stop_strings = (text[4:6],)
    assert model.chat(messages, 20, temperature=0.0) == text[: text.index(text[4:6])]
    with pytest.raises(FairyError, match="unknown sampling option 'heat'"):
        model.chat(messages, heat=1)


def test_stats_say_which_kernels_ran(tiny, make_engine):
    row = {"layout": "rows", "bytes": 1, "reason": "", "terms": "", "scale": "", "shape": (2, 2)}
    layers = [
        LayerEntry(name=name, kernel=kernel, stages=0, **row)
        for name, kernel in [("qkv", "x86.codebook"), ("out", "x86.codebook"), ("head", "dense")]
    ]
    model = Model(tiny[0], make_engine(threads=1), layers)
    assert all(kernel.calls == 0 for kernel in model.stats().kernels)
    model.generate("abcdefgh", 6, temperature=0.0)
    stats = model.stats()
    calls = {(k.kernel, k.batch): (k.layers, k.calls) for k in stats.kernels}
    assert calls["x86.codebook", "single"] == (2, 10)
    assert calls["x86.codebook", "many"] == (2, 2)
    assert calls["dense", "single"] == (1, 5)
    assert stats.decode_tokens == 5
    assert stats.threads == 1
    assert stats.kv_bytes_used == 0
    assert stats.kv_bytes_peak == 2 * 2 * 8 * 4 * 16  # one page held the few tokens
    # 2 (keys, values) x 1 layer x 2 heads x 8 x 4 bytes, 16 tokens a page, 4 x 64 tokens + 1 page
    assert stats.kv_bytes_total == 2 * 2 * 8 * 4 * 16 * (4 * 64 // 16 + 1)
    assert "x86.codebook (single) 10x" in stats.summary()
    assert stats.to_json()["decode_tokens"] == 5


def test_closed_model(tiny, make_engine):
    with Model(tiny[0], make_engine()) as model:
        model.logits([1])
    with pytest.raises(FairyError, match="is closed"):
        model.logits([1])


def test_threads_that_share_a_model_get_what_each_would_get_alone(model):
    prompts = ["def f(", "return", "for i in range", "x"]
    want = [model.generate(prompt, 40, temperature=0.0) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        for _ in range(3):
            found = pool.map(lambda prompt: model.generate(prompt, 40, temperature=0.0), prompts)
            assert list(found) == want
    assert model.engine.cache.sequences == []


@pytest.mark.parametrize("take", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_loaded_model_cannot_be_copied(model, take):
    with pytest.raises(FairyError, match=r"cannot be pickled or copied; load .* again"):
        take(model)
