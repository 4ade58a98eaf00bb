from __future__ import annotations

import pytest

from fairy_compile.artifact import check_chat_config, check_library
from fairy_compile.artifact.contract import (
    CHAT_FUNCTIONS,
    GPU_SAMPLER_FUNCTIONS,
    OPTIONAL_FUNCTIONS,
    REQUIRED_FUNCTIONS,
)
from fairy_compile.artifact.signature import Signature

from .conftest import concrete


@pytest.fixture
def library(artifact):
    manifest = artifact.read()
    return manifest["functions"], manifest["metadata"]


def test_tiny_library_keeps_the_contract(library):
    assert check_library(*library) == []
    assert check_library(*library, vocab_size=32) == []


@pytest.mark.parametrize("kind", ["cuda", "vulkan", "metal"])
def test_gpu_engines_need_the_sampler_functions(library, kind):
    functions, metadata = library
    problems = check_library(functions, metadata, kind)
    assert len(problems) == len(GPU_SAMPLER_FUNCTIONS) == 5
    functions |= {name: concrete(text) for name, text in GPU_SAMPLER_FUNCTIONS.items()}
    assert check_library(functions, metadata, kind) == []


def web_library(library):
    functions, metadata = library
    functions |= {name: concrete(text) for name, text in GPU_SAMPLER_FUNCTIONS.items()}
    params = [p for p in metadata["params"] if p["dtype"] != "uint8"]
    return functions, metadata | {"params": params}


@pytest.mark.parametrize("name", REQUIRED_FUNCTIONS["webgpu"])
def test_browsers_need_each_function_and_its_arguments(library, name):
    functions, metadata = web_library(library)
    assert check_library(functions, metadata, "webgpu") == []
    without = {k: v for k, v in functions.items() if k != name}
    problem = f"the library lacks the function {name!r}"
    assert check_library(without, metadata, "webgpu") == [problem]
    more = functions | {name: f"object, {functions[name]}".replace(", ->", " ->")}
    assert f"function {name!r} takes" in check_library(more, metadata, "webgpu")[0]


@pytest.mark.parametrize("key", ["params", "prefill_chunk_size"])
def test_browsers_need_the_metadata_they_read(library, key):
    functions, metadata = web_library(library)
    del metadata[key]
    (problem,) = check_library(functions, metadata, "webgpu")
    assert key in problem


def test_browsers_have_no_bytes(library):
    functions, _ = web_library(library)
    (problem,) = check_library(functions, library[1], "webgpu")
    assert "'layer.codes' is 'uint8'; browsers have float16, float32, int32, uint32" in problem


def test_every_signature_of_the_contract_parses():
    for table in (*REQUIRED_FUNCTIONS.values(), OPTIONAL_FUNCTIONS):
        for text in table.values():
            assert str(Signature.parse(text)) == text


@pytest.mark.parametrize("name", CHAT_FUNCTIONS)
def test_each_chat_function_is_required(library, name):
    functions, metadata = library
    del functions[name]
    assert check_library(functions, metadata) == [f"the library lacks the function {name!r}"]


@pytest.mark.parametrize(
    ("name", "signature", "problem"),
    [
        ("embed", "(n) int64, params -> (n, 4) float32", "argument 0"),
        ("embed", "(n) int32, params -> (1, n, 4) float32", "returns"),
        ("embed", "(7) int32, params -> (7, 4) float32", "n not fixed"),
        ("embed", "(n) int32, (8, 4) float32 -> (n, 4) float32", "argument 1"),
        ("embed", "(n) int32 -> (n, 4) float32", "takes 1 arguments"),
        ("embed", "(n) int32, params -> (n, 5) float32", "h = 5"),
        ("prefill", "(1, n, 4) float32, object, params -> (1, 1, 32) float32", "returns"),
        ("prefill", "(1, n, 4) float32, object, params -> [(1, 1, 32) float16, object]", "float16"),
        ("decode", "(1, 1, 4) float16, object, params -> [(1, 1, 32) float32, object]", "act ="),
        ("decode", "(1, 2, 4) float32, object, params -> [(1, 1, 32) float32, object]", "argument"),
        ("alloc_embedding_tensor", "-> (8, 4) float32", "8 rows"),
        ("apply_bitmask_inplace", "(b, 32) float32, (s) int32, (b, 2) int32 -> none", "ceil"),
        ("create_tir_paged_kv_cache", "shape, shape, shape, shape -> object", "takes 4 arguments"),
        ("embed", "nonsense", "malformed"),
        ("create_rnn_state", "shape, shape -> object", "in place of the KV cache"),
        ("batch_verify", "(1, n, 4) float32, object -> none", "takes 2 arguments"),
    ],
)
def test_wrong_signatures(library, name, signature, problem):
    functions, metadata = library
    problems = check_library(functions | {name: signature}, metadata)
    assert problems
    assert any(problem in text and name in text for text in problems)


def test_symbolic_sizes_are_allowed(library):
    functions, metadata = library
    functions["softmax_with_temperature"] = "(m, 1, vs) float32, (m) float32 -> (m, 1, vs) float32"
    functions["apply_bitmask_inplace"] = "(b, v) float32, (s) int32, (b, ?) int32 -> none"
    assert check_library(functions, metadata) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prefill_chunk_size", 0),
        ("max_batch_size", "4"),
        ("tensor_parallel_shards", 2),
        ("context_window_size", 0),
        ("context_window_size", 64.0),
        ("kv_state_kind", "rnn_state"),
        ("kv_cache", {"head_dim": 4}),
        ("params", [{"name": "a"}]),
        ("memory_usage", {"prefill": 1.5}),
        ("sliding_window_size", None),
    ],
)
def test_wrong_metadata(library, key, value):
    functions, metadata = library
    assert check_library(functions, metadata | {key: value})


def test_unknown_device_kind(library):
    assert "tpu" in check_library(*library, "tpu")[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", 32.0),
        ("vocab_size", True),
        ("vocab_size", 33),
        ("prefill_chunk_size", -1),
        ("sliding_window_size", 0),
        ("temperature", "1.0"),
        ("tokenizer_info", {}),
        ("conv_template", "llama-2"),
        ("eos_token_id", [1.0]),
        ("active_vocab_size", None),
    ],
)
def test_wrong_chat_config(artifact, key, value):
    config = artifact.read("mlc-chat-config.json")
    assert check_chat_config(config) == []
    assert check_chat_config(config | {key: value})


def test_browsers_need_exactly_one_window(artifact):
    config = artifact.read("mlc-chat-config.json")
    assert check_chat_config(config, "webgpu") == []
    assert check_chat_config(config | {"context_window_size": -1}, "webgpu")
    assert check_chat_config(config | {"context_window_size": -1}, "cpu") == []


@pytest.mark.parametrize("seps", [[], ["a", "b", "c"]])
def test_number_of_separators(artifact, seps):
    config = artifact.read("mlc-chat-config.json")
    config["conv_template"]["seps"] = seps
    assert "seps" in check_chat_config(config)[0]
