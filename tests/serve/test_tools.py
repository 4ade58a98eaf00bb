"""Tool calls: read from text in any pieces, and asked of a server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

import openai
import pytest

import fairy_compile as fc
from fairy_compile.serve.tools import (
    FORMS,
    NO_ARGUMENTS,
    Arguments,
    CallBegins,
    Part,
    Text,
    ToolReader,
    form_of,
    structure,
    with_objects,
)

from .conftest import MODEL, NAME, SEQUENCES, listening

HERMES, LLAMA = FORMS
# What Qwen's templates do, in short.
TEMPLATE = """{{ bos_token }}{% if tools %}<|user|>Answer with <tool_call> for one of
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|end|>{% endif %}{% for message in messages %}{% if message.role == 'tool' %}<|user|>\
<tool_response>{{ message.content }}</tool_response><|end|>{% else %}<|{{ message.role }}|>\
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|end|>{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
                "units": {"enum": ["C", "F"]},
            },
            "required": ["city", "days", "units"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
LONG = {"temperature": 1.0, "max_tokens": 500}
ASK = [{"role": "user", "content": "What is the weather in Paris?"}]


def read(form, names, pieces) -> list[Part]:
    """Return the parts of a text, neighbours of a kind joined."""
    reader, parts = ToolReader(form, names), []
    for part in [*(p for piece in pieces for p in reader.push(piece)), *reader.finish()]:
        last = parts[-1] if parts else None
        if isinstance(part, Text) and isinstance(last, Text):
            parts[-1] = Text(last.text + part.text)
        elif isinstance(part, Arguments) and isinstance(last, Arguments):
            parts[-1] = Arguments(part.index, last.text + part.text)
        else:
            parts.append(part)
    return parts


ARGUMENTS = ('{"a": "} \\\\\\" ]", "b": [{}, {"c": 1}]}', "{}")


def write(form, name: str, arguments: str) -> str:
    return form.begin(name) + arguments + form.after


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_calls_are_told_from_text_in_any_pieces(form, size: int) -> None:
    calls = [write(form, "ab", ARGUMENTS[0]), write(form, "a", ARGUMENTS[1])]
    text = f"Look: {{1}} < and so\n\n{calls[0]}\n{calls[1]}\n"
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert read(form, ("a", "ab"), pieces) == [
        Text("Look: {1} < and so"),
        CallBegins(0, "ab"),
        Arguments(0, ARGUMENTS[0]),
        CallBegins(1, "a"),
        Arguments(1, ARGUMENTS[1]),
    ]


@pytest.mark.parametrize("form", FORMS)
def test_what_only_looks_like_a_call_is_text(form) -> None:
    for text in ("a < b\n", form.trigger[:-1], "", " \n", f"{form.before}other", "{'name'"):
        assert read(form, ("a",), list(text)) == ([Text(text)] if text else [])


def test_an_answer_that_is_cut_off_keeps_what_there_is() -> None:
    text = write(HERMES, "a", '{"b": 12}')[:-16]
    reader = ToolReader(HERMES, ("a",))
    parts = reader.push(text)
    assert parts == [CallBegins(0, "a"), Arguments(0, '{"b": 1')]
    assert reader.finish() == []
    assert (reader.calls, reader.complete) == (1, 0)


def test_templates_tell_their_form() -> None:
    assert form_of(TEMPLATE) is HERMES
    assert form_of('{% if tools %}{"name": "x", "parameters": {}}{% endif %}') is LLAMA
    assert form_of("{% if tools %}[TOOL_CALLS]{% endif %}") is None
    assert form_of("<tool_call>, but no list of any") is None
    assert form_of(None) is None


def test_templates_get_arguments_as_objects() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "a", "arguments": '{"b": [1]}'}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    function = with_objects(message)["tool_calls"][0]["function"]
    assert function == {"name": "a", "arguments": {"b": [1]}}
    assert with_objects({"role": "user", "tool_calls": None}) == {"role": "user"}
    for wrong, words in (
        ("{", "no JSON"),
        ("[1]", "no JSON object"),
        (3, "no JSON object"),
    ):
        bad = {**call, "function": {"name": "a", "arguments": wrong}}
        with pytest.raises(ValueError, match=words):
            with_objects({**message, "tool_calls": [bad]})
    for form in ("x", [3], [{"function": {}}]):
        with pytest.raises(ValueError, match="a function with a name"):
            with_objects({**message, "tool_calls": form})


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("xgrammar", reason="xgrammar is missing: pip install '.[serve]'")
    from fairy_compile.serve.worker import EngineThread

    root = tmp_path_factory.mktemp("tools")
    shutil.copytree(MODEL, root / "model")
    (root / "model" / "chat_template.jinja").write_text(TEMPLATE)
    fc.build(root / "model", target="cpu", max_batch=SEQUENCES, output=root / "out")
    thread = EngineThread(lambda: fc.load(root / "out", max_sequences=SEQUENCES))
    with listening(thread) as url:
        yield url
    thread.close(30)


@pytest.fixture
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def chat(client: openai.OpenAI, messages=ASK, **options):
    options = {"tools": [WEATHER, CLOCK], "temperature": 0, "max_tokens": 120, **options}
    return client.chat.completions.create(model=NAME, messages=messages, **options)


def check_weather(arguments: str) -> None:
    given = json.loads(arguments)
    assert given.keys() == {"city", "days", "units"}
    assert len(given["city"]) <= 12
    assert 1 <= given["days"] <= 9
    assert given["units"] in ("C", "F")


def test_a_named_tool_is_called_with_arguments_of_its_schema(client) -> None:
    choice = {"type": "function", "function": {"name": "get_weather"}}
    reply = chat(client, tool_choice=choice, parallel_tool_calls=False).choices[0]
    assert reply.finish_reason == "tool_calls"
    assert reply.message.content is None
    (call,) = reply.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "get_weather"
    check_weather(call.function.arguments)


def test_required_calls_some_tool_and_samples_differ(client) -> None:
    reply = chat(client, tool_choice="required", parallel_tool_calls=False, n=4, seed=3, **LONG)
    calls = [choice.message.tool_calls[0] for choice in reply.choices]
    assert {call.function.name for call in calls} <= {"get_weather", "clock"}
    assert len({call.id for call in calls}) == 4
    for call in calls:
        if call.function.name == "get_weather":
            check_weather(call.function.arguments)
        else:
            assert json.loads(call.function.arguments) == {}


def test_a_stream_gives_the_same_call_in_pieces(client) -> None:
    choice = {"type": "function", "function": {"name": "get_weather"}}
    options = {"tool_choice": choice, "parallel_tool_calls": False}
    whole = chat(client, **options).choices[0].message.tool_calls[0]
    deltas, reasons = [], []
    for chunk in chat(client, stream=True, **options):
        deltas += chunk.choices[0].delta.tool_calls or []
        assert not chunk.choices[0].delta.content
        reasons.append(chunk.choices[0].finish_reason)
    assert deltas[0].function.name == "get_weather"
    assert deltas[0].id
    assert all(delta.index == 0 for delta in deltas)
    assert all(delta.id is None for delta in deltas[1:])
    assert len(deltas) > 3
    text = "".join(delta.function.arguments or "" for delta in deltas)
    assert text == whole.function.arguments
    assert reasons[-1] == "tool_calls"


def test_an_answer_may_do_without_calls(client) -> None:
    """The bundled model knows of no tools; its text is what it is without them in the prompt."""
    reply = chat(client, tool_choice="auto", max_tokens=16).choices[0]
    assert reply.message.content
    assert reply.message.tool_calls is None
    none = chat(client, tool_choice="none", max_tokens=16).choices[0].message
    plain = chat(client, tools=openai.omit, max_tokens=16).choices[0].message
    assert none.content == plain.content
    assert none.tool_calls is None


def test_results_of_calls_are_part_of_the_conversation(client) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "clock", "arguments": "{}"},
    }
    messages = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12:00"},
    ]
    longer = chat(client, messages, max_tokens=4).usage.prompt_tokens
    assert longer > chat(client, max_tokens=4).usage.prompt_tokens + 10


def test_a_call_that_was_cut_off_ends_for_length(client) -> None:
    reply = chat(client, tool_choice="required", max_tokens=24).choices[0]
    assert reply.finish_reason == "length"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "not among tools"),
        ({"tools": [CLOCK, CLOCK]}, "two tools have one name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name"),
        ({"response_format": {"type": "json_object"}}, "no tool may be called"),
        ({"logprobs": True}, "no tool may be called"),
        ({"tools": [], "tool_choice": "required"}, "not among tools"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": 3}}}]},
            "unusable JSON schema",
        ),
    ],
)
def test_what_is_wrong_is_told(client, options, words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        chat(client, **options)


def test_a_model_without_a_form_for_calls_refuses_tools(engine) -> None:
    with listening(engine) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="chat template shows no tools"):
            chat(client)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize("parallel", [True, False])
def test_grammars_allow_calls_that_conform_and_no_others(
    engine, form, required: bool, parallel: bool
) -> None:
    pytest.importorskip("xgrammar", reason="xgrammar is missing: pip install '.[serve]'")
    from fairy_compile.serve.grammar import GrammarCompiler

    model = engine.model
    compiler = GrammarCompiler(model.tokenizer, model.engine.vocab_size, model.stop_tokens)
    function = WEATHER["function"]
    grammar = compiler.compile_structure(
        structure(
            form,
            [(function["name"], function["parameters"]), ("clock", NO_ARGUMENTS)],
            required=required,
            parallel=parallel,
            max_whitespace=4,
        )
    )

    def allowed(text: str) -> bool:
        return grammar.matcher()._matcher.accept_string(text)

    good = write(form, "get_weather", '{"city": "Oslo", "days": 3, "units": "C"}')
    assert allowed(good)
    assert allowed(write(form, "clock", "{}"))
    assert allowed("It is ") is not required
    assert allowed(f"{good}\n{write(form, 'clock', '{}')}") is parallel
    for arguments in ('{"city": 3', '{"city": "Oslo", "days": 12', '{"town"', "[", '{"days": 3'):
        assert not allowed(form.begin("get_weather") + arguments)
    assert not allowed(form.begin("other"))
    assert not allowed(form.begin("clock") + '{"a"')
