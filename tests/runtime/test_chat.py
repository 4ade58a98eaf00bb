import pytest

from fairy_compile.errors import FairyError

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def chat(model):
    model.template.source = TEMPLATE
    return model.chat_session("S")


def greedy(chat, text, max_tokens=5):
    return chat.send(text, max_tokens, temperature=0.0)


def test_history_and_answers_equal_one_shot_chat(model, chat):
    first = greedy(chat, "a b").read()
    assert first == model.chat(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "a b"}],
        5,
        temperature=0.0,
    )
    second = greedy(chat, "c").read()
    roles = [m["role"] for m in chat.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert second == model.chat(chat.messages[:-1], 5, temperature=0.0)


def test_the_second_turn_reuses_the_cache(model, chat):
    answer = greedy(chat, "hello")
    answer.read()
    before = model.stats().prefill_tokens
    # Tokens of the first prompt, and those of the answer that came back the same.
    prompt = model.encode_chat(chat.messages[:-1])
    greedy(chat, "more").read()
    whole = model.encode_chat(chat.messages[:-1])
    assert chat.reused_tokens >= len(prompt)
    assert model.stats().prefill_tokens - before == len(whole) - chat.reused_tokens
    assert len(model.engine.cache.sequences) == 1


def test_a_changed_history_is_rewound(model, chat):
    greedy(chat, "hello there").read()
    chat.messages = [{"role": "user", "content": "other"}]
    answer = greedy(chat, "x").read()
    assert chat.reused_tokens == 0
    assert answer == model.chat(chat.messages[:-1], 5, temperature=0.0)


def test_an_answer_closed_early_stays_in_the_history(chat):
    answer = greedy(chat, "hello", 8)
    shown = next(answer)
    answer.close()
    assert chat.messages[-1] == {"role": "assistant", "content": shown}
    rest = greedy(chat, "go on")
    assert rest.read()


def test_a_new_message_ends_a_running_answer(chat):
    answer = greedy(chat, "hello", 8)
    next(answer)
    second = greedy(chat, "wait")
    assert answer.finish_reason == "cancelled"
    second.read()
    assert [m["role"] for m in chat.messages].count("assistant") == 2


def test_an_answer_never_started_leaves_no_trace(chat):
    greedy(chat, "hello")
    assert greedy(chat, "other").read()
    assert [m["content"] for m in chat.messages[:2]] == ["S", "other"]


def test_interrupted_before_the_first_word(model, chat, monkeypatch):
    greedy(chat, "one").read()
    history = list(chat.messages)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.engine.library, "call_logits", interrupted)
        with pytest.raises(KeyboardInterrupt):
            greedy(chat, "two").read()
    assert chat.messages == history
    answer = greedy(chat, "two").read()
    assert answer == model.chat(chat.messages[:-1], 5, temperature=0.0)


def test_a_full_context_is_refused_and_the_history_kept(chat):
    greedy(chat, "hi").read()
    history = list(chat.messages)
    with pytest.raises(FairyError, match=r"has \d+ tokens, and the context holds 64.*/reset"):
        greedy(chat, "x y z " * 30)
    assert chat.messages == history
    assert greedy(chat, "ok").read()


def test_an_answer_ends_where_the_context_does(chat):
    answer = greedy(chat, "hello", 500)
    answer.read()
    assert answer.finish_reason in ("context", "stop")


def test_conversations_that_are_left_free_their_sequences(model, chat):
    for _ in range(model.engine.cache.max_sequences + 1):
        greedy(model.chat_session("S"), "a").read()
    assert model.engine.cache.sequences == []


def test_reset_keeps_the_system_message(model, chat):
    greedy(chat, "hello").read()
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "S"}]
    assert model.engine.cache.sequences == []
    assert greedy(chat, "again").read()
    chat.close()
    assert model.engine.cache.sequences == []


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_an_answer_that_outlives_its_model_ends_quietly(model, chat):
    answer = chat.send("hello", 40, temperature=0)
    next(iter(answer))
    model.close()
    answer.close()
    assert chat.messages[-1] == {"role": "assistant", "content": answer.text}
