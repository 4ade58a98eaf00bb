import json

import pytest

from fairy_compile.errors import FairyError, ModelFileError
from fairy_compile.runtime.chat_template import ChatTemplate

CHATML = (
    "{% for message in messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('no system message, please') }}{% endif %}"
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %}{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
)
TOOLS = (
    "{% for m in messages %}{% if m.skip is defined %}{% continue %}{% endif %}"
    "{{ m.content | tojson }}{% endfor %}{{ tools | tojson(indent=2) if tools else 'none' }}"
    "{{ strftime_now('%Y') | length }}"
)
CHAT = [
    {"role": "user", "content": " Hi <there> é "},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]


@pytest.mark.parametrize("source", [CHATML, LLAMA, TOOLS])
@pytest.mark.parametrize("tools", [None, [{"name": "f", "text": "a<b"}]])
def test_rendering_equals_transformers(source, tools):
    transformers = pytest.importorskip("transformers.utils.chat_template_utils")
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    want = transformers.render_jinja_template(
        conversations=[CHAT],
        chat_template=source,
        tools=tools,
        add_generation_prompt=True,
        **special,
    )[0][0]
    assert ChatTemplate(source, special).render(CHAT, tools=tools) == want


def test_refusal_of_the_template_is_an_error():
    template = ChatTemplate(LLAMA, {"bos_token": "<s>"})
    with pytest.raises(FairyError, match="refuses this chat: no system message, please"):
        template.render([{"role": "system", "content": "x"}])


@pytest.mark.parametrize("message", [{"role": "user"}, {"content": "x"}, "text", {"role": 1}])
def test_malformed_messages_are_refused(message):
    with pytest.raises(FairyError, match="expected an object with role and content"):
        ChatTemplate(CHATML).render([message])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ 1 // 0 }}",
        "{{ undefined_thing.attribute }}",
    ],
)
def test_the_sandbox_holds(source):
    with pytest.raises(FairyError, match="refuses this chat"):
        ChatTemplate(source).render(CHAT)


def test_a_template_that_does_not_parse():
    with pytest.raises(ModelFileError, match="does not parse"):
        ChatTemplate("{% for %}").render(CHAT)


def write(directory, config=None, jinja=None):
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    if jinja is not None:
        (directory / "chat_template.jinja").write_text(jinja, "utf-8")
    return ChatTemplate.from_directory(directory)


def test_where_templates_are_found(tmp_path):
    special = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": None}
    template = write(tmp_path, special | {"chat_template": "A{{ bos_token }}"})
    assert template.render([]) == "A<s>"
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert write(tmp_path, {"chat_template": named}).render([]) == "D"
    assert write(tmp_path, {"chat_template": named}, jinja="J").render([]) == "J"


def test_no_template_joins_messages_and_says_so(tmp_path):
    template = ChatTemplate.from_directory(tmp_path)
    assert template.source is None
    assert "no chat template" in template.note
    assert template.render(CHAT) == " Hi <there> é \nHello\nBye"
    assert ChatTemplate(CHATML).note is None


def test_bad_files_are_sentences(tmp_path):
    with pytest.raises(ModelFileError, match="chat_template is a int"):
        write(tmp_path, {"chat_template": 3})
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelFileError, match="not valid JSON"):
        ChatTemplate.from_directory(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ModelFileError, match="no JSON object"):
        ChatTemplate.from_directory(tmp_path)


def test_messages_that_a_template_leaves_out_are_refused():
    known = (
        "{% for m in messages %}{% if m.role in ('user', 'assistant') %}{{ m.content }}{% endif %}"
        "{% endfor %}"
    )
    user = {"role": "user", "content": "hello"}
    system = {"role": "system", "content": "Be brief."}
    with pytest.raises(FairyError, match="shows no messages of the role 'system'; put"):
        ChatTemplate(known, {}).check_shown([system, user])
    ChatTemplate(known, {}).check_shown([{**system, "content": ""}, user])
    ChatTemplate(None, {}).check_shown([system, user])
    every = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    ChatTemplate(every, {}).check_shown([system, user, {**system, "role": "tool"}])
    # What one says may be what the template says by itself.
    default = (
        "{% if messages[0].role != 'system' %}Be brief.{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    ChatTemplate(default, {}).check_shown([system, user])
