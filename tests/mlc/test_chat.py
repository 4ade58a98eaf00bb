"""Chats in MLC's engines: the one of phones (C++) and the one of Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

import fairy_compile as fc
from tests.artifact.test_conv_template import SPECIAL, TEMPLATES, say
from tests.tiny_models import save_model

pytestmark = pytest.mark.slow
STEPS = 1  # more of them may be parts of a letter, which streams write differently
CHATS = [["Hi"], ["def f():", "return 1", "why? ümläut\n\n two"]]


def save_chat_model(directory: Path, template: str) -> Path:
    """Write a Llama model whose tokenizer knows the special tokens of ``template``."""
    save_model(directory, "llama")
    path = directory / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.save(str(path))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    path = directory / "config.json"
    ids = {
        "bos_token_id": tokenizer.token_to_id("<s>"),
        "eos_token_id": tokenizer.token_to_id("</s>"),
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | ids))
    return directory


def phone_engine() -> type:
    """Return the engine behind MLC's apps."""
    from mlc_llm.json_ffi import JSONFFIEngine

    return JSONFFIEngine


def python_engine() -> type:
    """Return the engine behind MLC's Python package and its server."""
    from mlc_llm import MLCEngine

    return MLCEngine


def ask(engine: Any, messages: list[dict[str, str]]) -> tuple[int, str]:
    """Return (tokens of the prompt, the likeliest answer without special tokens)."""
    text, tokens = "", -1
    settings = {"temperature": 0.0, "top_p": 1.0, "max_tokens": STEPS, "stream": True}
    for part in engine.chat.completions.create(
        messages=messages, stream_options={"include_usage": True}, **settings
    ):
        if part.usage is not None:
            tokens = part.usage.prompt_tokens
        text += "".join(choice.delta.content or "" for choice in part.choices)
    for special in SPECIAL:
        text = text.replace(special, "")
    return tokens, text


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("engine_type", [phone_engine, python_engine])
def test_prompts_are_those_of_our_runner(build, engine_type, name: str, tmp_path: Path) -> None:
    """As many tokens as the chat template makes, answered by the same token."""
    import tvm
    from mlc_llm.serve import EngineConfig

    out = build("cpu", save_chat_model(tmp_path / "model", TEMPLATES[name]))
    system = None if name == "no_system" else "Obey."
    engine = engine_type()(
        str(out),
        tvm.cpu(),
        model_lib=str(out / "model.so"),
        engine_config=EngineConfig(max_total_sequence_length=1024),
    )
    try:
        with fc.load(out) as model:
            for contents in CHATS:
                messages = say(*contents, system=system)
                want = model.chat(messages, max_tokens=STEPS, temperature=0.0)
                assert ask(engine, messages) == (len(model.encode_chat(messages)), want)
    finally:
        engine.terminate()
