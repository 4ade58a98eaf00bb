"""Unmodified WebLLM, in Chromium on a software GPU, gives the tokens of our CPU runtime."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

import fairy_compile as fc
from tests.greedy import greedy
from tests.tiny_models import save_model
from tests.web.sizes import SMALL

pytestmark = pytest.mark.slow

PROMPT = "def function(argument):"
COUNT = 8
FEW = 3  # tokens of the large vocabulary, whose sort takes SwiftShader many seconds each
# The vocabulary of Qwen2: its sort and its sampler are those of a real model.
QWEN2 = {**SMALL, "vocab_size": 151936}
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "word": {"enum": ["phase", "code"]}},
    "required": ["ok", "word"],
    "additionalProperties": False,
}

# Begins every test's code: an engine, and what completes and chats with it.
_ENGINE = """
const { CreateMLCEngine } = await import("/web-llm/index.js");
const { model_list: [record], model_id } = await (await fetch("/models.json")).json();
const url = (path) => new URL(path, location.href).href;
const model = { ...record, model: url(record.model), model_lib: url(record.model_lib) };
const engine = await CreateMLCEngine(model_id, {
  appConfig: { model_list: [model] },
  initProgressCallback: ({ text }) => console.log(text),
});
const ids = () => [...engine.loadedModelIdToPipeline.get(model_id).outputIds];
const plain = { temperature: 0, repetition_penalty: 1, ignore_eos: true };
const complete = async (options) => {
  const answer = await engine.completions.create({ ...plain, ...options });
  return { ids: ids(), text: answer.choices[0].text };
};
const chat = (messages, options) =>
  engine.chat.completions.create({ messages, ...plain, ...options });
"""


def build_both(root: Path, family: str, quant: str, **sizes: Any) -> tuple[Any, Path]:
    """Return a model on the CPU and its artifact for browsers, both with float activations."""
    source = save_model(root / "source", family, **sizes)
    common = {"quant": quant, "act": "float", "context": 256, "prefill_chunk": 64}
    fc.build(source, target="cpu", output=root / "cpu", **common)
    fc.build(source, target="webgpu-f32", output=root / family, **common)
    return fc.load(root / "cpu", threads=1), root / family


def own_page(root: Path) -> Path:
    """Return a directory with an empty page, which loads no model by itself."""
    root.mkdir()
    (root / "index.html").write_text("<!doctype html><title>test</title>")
    return root


def encode(directory: Path, text: str) -> list[int]:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return tokenizer.encode(text, add_special_tokens=False).ids


def blanks(directory: Path) -> list[int]:
    """Return the tokens that are white space alone."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return [i for i in range(tokenizer.get_vocab_size()) if tokenizer.decode([i]).isspace()]


def penalised(model: Any, prompt: list[int], count: int, presence: float, frequency: float) -> list:
    """Return greedy tokens under OpenAI's penalties on what was generated."""
    engine, tokens = model.engine, []
    sequence = engine.add_sequence()
    logits = engine.prefill(sequence, prompt)
    for _ in range(count):
        times = np.bincount(tokens, minlength=logits.size) if tokens else np.zeros(logits.size)
        tokens.append(int(np.argmax(logits - presence * (times > 0) - frequency * times)))
        logits = engine.decode([sequence], tokens[-1:])[0]
    return tokens


def test_a_vocabulary_of_152k_sorts_and_samples(
    browse: Callable[..., list[Any]], tmp_path: Path
) -> None:
    """Qwen2, W1, tied head: greedy tokens, and a draw from a nucleus."""
    model, directory = build_both(tmp_path, "qwen2", "w1", **QWEN2)
    prompt = encode(directory, PROMPT)
    code = f"""async () => {{{_ENGINE}
      const prompt = {json.dumps(PROMPT)};
      const greedy = await complete({{ prompt, max_tokens: {FEW} }});
      const drawn = await complete(
        {{ prompt, max_tokens: 1, temperature: 1, top_p: 0.001, seed: 1 }});
      return {{ greedy, drawn }};
    }}"""
    page = own_page(tmp_path / "page")
    (got,) = browse(directory, [("evaluate", code)], page=page)
    assert got["greedy"]["ids"] == greedy(model, prompt, FEW)
    logits = model.logits(prompt)[-1].astype(np.float64)
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    order = np.argsort(-probabilities)
    before = np.cumsum(probabilities[order]) - probabilities[order]
    nucleus = set(order[before < 0.001 + 1e-6].tolist())
    assert 0 < len(nucleus) < 1000
    assert got["drawn"]["ids"][0] in nucleus


def test_everything_a_chat_asks_for(browse: Callable[..., list[Any]], tmp_path: Path) -> None:
    """Llama, W2: greedy tokens, chat, streams, top_p, penalties, bias, JSON schemas."""
    model, directory = build_both(tmp_path, "llama", "w2", **SMALL)
    prompt = encode(directory, PROMPT)
    # Between the parts of a JSON text, random weights would write blanks for ever.
    no_blanks = dict.fromkeys(blanks(directory), -100)
    code = f"""async () => {{{_ENGINE}
      const prompt = {json.dumps(PROMPT)};
      const max_tokens = {COUNT};
      const greedy = await complete({{ prompt, max_tokens }});
      const penalised = await complete(
        {{ prompt, max_tokens, presence_penalty: 1.5, frequency_penalty: 1 }});
      const biased = await complete({{ prompt, max_tokens: 3, logit_bias: {{ 65: 100 }} }});
      const drawn = [];
      for (const seed of [7, 7, 8])
        drawn.push(await complete({{ prompt, max_tokens, temperature: 1, top_p: 0.9, seed }}));
      const first = [{{ role: "user", content: "return an argument" }}];
      const answer = (await chat(first, {{ max_tokens }})).choices[0].message.content;
      const turns = [...first, {{ role: "assistant", content: answer }},
                     {{ role: "user", content: "and another" }}];
      const second = (await chat(turns, {{ max_tokens }})).choices[0].message.content;
      await engine.resetChat();
      let streamed = "";
      let chunks = 0;
      for await (const chunk of await chat(turns, {{ max_tokens, stream: true }})) {{
        streamed += chunk.choices[0]?.delta?.content ?? "";
        chunks += 1;
      }}
      const response_format = {{ type: "json_object", schema: {json.dumps(json.dumps(SCHEMA))} }};
      const logit_bias = {json.dumps(no_blanks)};
      const json = (await chat(
        first, {{ max_tokens: 60, response_format, logit_bias, ignore_eos: false }})).choices[0];
      return {{ greedy, penalised, biased, drawn, second, streamed, chunks, json }};
    }}"""
    (got,) = browse(directory, [("evaluate", code)], page=own_page(tmp_path / "page"))
    assert got["greedy"]["ids"] == greedy(model, prompt, COUNT)
    assert got["penalised"]["ids"] == penalised(model, prompt, COUNT, 1.5, 1.0)
    assert got["penalised"]["ids"] != got["greedy"]["ids"]
    assert got["biased"]["ids"] == [65] * 3
    assert got["drawn"][0] == got["drawn"][1] != got["drawn"][2]
    assert got["second"]
    assert got["streamed"] == got["second"]
    assert got["chunks"] > 2
    assert got["json"]["finish_reason"] == "stop"
    value = json.loads(got["json"]["message"]["content"])
    assert set(value) == {"ok", "word"}
    assert type(value["ok"]) is bool
    assert value["word"] in ("phase", "code")
