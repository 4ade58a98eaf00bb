from __future__ import annotations

import json
from pathlib import Path

import pytest

from fairy_compile.artifact.contract import CONV_TEMPLATE
from fairy_compile.artifact.conv_template import (
    DEFAULT_SYSTEM_MESSAGE,
    chat_template_source,
    derive_conv_template,
    render_conv_template,
)
from fairy_compile.artifact.schema import check
from fairy_compile.artifact.tokenizer_files import TokenizerFiles
from fairy_compile.errors import ModelFileError

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>"]

CHATML = """{% for m in messages %}
{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}"""

CHATML_DEFAULT = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    + CHATML
)

LLAMA2 = """{%- if messages[0].role == 'system' -%}
{%- set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' -%}
{%- set messages = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}
{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content.strip() + ' [/INST]' }}
{%- else -%}{{ ' ' + m.content + ' ' + eos_token }}{%- endif -%}
{%- endfor -%}"""

LLAMA3 = """{{- bos_token }}
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|start|>system<|end|>\\n\\nKnowledge: 2023\\n\\n' + system + '<|eot|>' }}
{%- for m in messages %}{{- '<|start|>' + m.role + '<|end|>\\n\\n' + m.content + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\\n\\n' }}{%- endif %}"""

NO_SYSTEM = """{{ bos_token }}
{%- for m in messages %}
{%- if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{%- if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- else %}{{ ' ' + m.content + eos_token }}{% endif %}
{%- endfor %}"""

THINKING = """{{ bos_token }}
{%- for m in messages %}
{{- '<|start|>' + m.role + '<|end|>' + m.content + '<|eot|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|><think>\\n' }}{%- endif %}"""

PLAIN_WORDS = """{% for m in messages %}{{ m.role.upper() + ': ' + m.content + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""


def model(directory: Path, template: object = None, **config: object) -> TokenizerFiles:
    tokens = [{"id": i, "content": text, "special": True} for i, text in enumerate(SPECIAL)]
    tokenizer = {"added_tokens": tokens, "model": {"vocab": {"a": 7}}}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}} | config
    if template is not None:
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return TokenizerFiles.read(directory)


def hugging_face(files: TokenizerFiles, messages: list[dict[str, str]]) -> str:
    """Render as transformers does."""
    from transformers.utils.chat_template_utils import render_jinja_template

    source = chat_template_source(files)
    ((text,), _) = render_jinja_template(
        [messages],
        chat_template=source,
        add_generation_prompt=True,
        bos_token="<s>",
        eos_token="</s>",
    )
    return text.removeprefix("<s>")


def say(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": "system", "content": system}] if system is not None else []
    roles = ("user", "assistant")
    return turns + [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


TOOLS = """{% if tools is not none %}{{ 'TOOLS' }}{% endif %}
{%- for m in messages %}{{ '<|start|>' + m.role + '<|end|>' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}
{%- else %}{{ m.content }}{% endif %}{{ '<|eot|>' }}
{%- endfor %}{{ '<|start|>assistant<|end|>' }}"""

TEMPLATES = {
    "tools": TOOLS,
    "chatml": CHATML,
    "chatml_default": CHATML_DEFAULT,
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "no_system": NO_SYSTEM,
    "thinking": THINKING,
    "plain_words": PLAIN_WORDS,
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_equals_that_of_transformers(tmp_path, name):
    files = model(tmp_path, TEMPLATES[name])
    derived = derive_conv_template(files, [1])
    assert derived.reason == ""
    assert check(derived.template, CONV_TEMPLATE, "") == []
    system = None if name == "no_system" else "Obey."
    for contents in (["Hi"], ["Hi", "Yes?", "Why"], ["a", "b", "c", "d", "e"]):
        messages = say(*contents, system=system)
        assert render_conv_template(derived.template, messages) == hugging_face(files, messages)


@pytest.mark.parametrize("name", ["chatml_default", "llama3", "no_system"])
def test_prompt_without_system_message_equals_that_of_transformers(tmp_path, name):
    files = model(tmp_path, TEMPLATES[name])
    template = derive_conv_template(files).template
    messages = say("Hi", "Yes?", "Why")
    assert render_conv_template(template, messages) == hugging_face(files, messages)


def test_parts_of_chatml(tmp_path):
    derived = derive_conv_template(model(tmp_path, CHATML), [1])
    template = derived.template
    assert template["system_template"] == "<|im_start|>system\n{system_message}<|im_end|>\n"
    assert template["system_message"] == DEFAULT_SYSTEM_MESSAGE
    assert template["roles"]["user"] == "<|im_start|>user\n"
    assert template["roles"]["assistant"] == "<|im_start|>assistant\n"
    assert template["seps"] == ["<|im_end|>\n", "<|im_end|>\n"]
    assert template["stop_token_ids"] == [1, 3]
    assert derived.stop_tokens == ("<|im_end|>",)
    assert template["system_prefix_token_ids"] == []


def test_default_system_message_is_the_templates_own(tmp_path):
    template = derive_conv_template(model(tmp_path, CHATML_DEFAULT)).template
    assert template["system_message"] == "Be kind."


def test_parts_of_llama2(tmp_path):
    template = derive_conv_template(model(tmp_path, LLAMA2)).template
    assert template["add_role_after_system_message"] is False
    assert template["roles"]["user"] == "[INST] "
    assert template["seps"][1] == " </s><s>"
    assert template["system_prefix_token_ids"] == [0]
    assert template["stop_token_ids"] == [1]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "no chat template"),
        ("{% for %}", "does not compile"),
        ("{{ 1 / 0 }}", "failed"),
        ("{{ messages[0].content.__class__.__mro__ }}", "failed"),
        ("nothing", "does not print"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "does not print"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "does not print"),
        (
            "{% for m in messages %}{{ loop.index }}{{ m.role }}{{ m.content }}{% endfor %}",
            "the chat template",
        ),
    ],
)
def test_other_templates_fall_back_to_plain_text(tmp_path, source, reason):
    derived = derive_conv_template(model(tmp_path, source, add_bos_token=True), [1])
    assert reason in derived.reason
    assert check(derived.template, CONV_TEMPLATE, "") == []
    assert render_conv_template(derived.template, say("Hi")) == "Hi"
    assert derived.template["system_prefix_token_ids"] == [0]
    assert derived.template["stop_token_ids"] == [1]


def test_template_in_its_own_file_wins(tmp_path):
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert chat_template_source(model(tmp_path, "other")) == CHATML


def test_named_templates(tmp_path):
    named = [{"name": ["tool_use"], "template": "x"}, {"name": "default", "template": CHATML}]
    assert chat_template_source(model(tmp_path, named)) == CHATML
    assert chat_template_source(model(tmp_path, named[:1])) is None


def test_template_in_the_processors_file(tmp_path):
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    assert chat_template_source(model(tmp_path)) == CHATML


def test_template_that_is_not_text(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelFileError, match="cannot read"):
        derive_conv_template(model(tmp_path))
