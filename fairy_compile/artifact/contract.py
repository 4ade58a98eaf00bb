"""What an MLC engine demands of a model library and its ``mlc-chat-config.json``, as data.

Read from mlc-llm's C++ engine and web-llm, and confirmed by taking one function or key away at a
time from a library that the engine runs. Symbols of dimensions: h hidden size and v vocabulary
size are the same in the whole library; n tokens, b sequences, s samples and k entries change
from call to call, so a library must keep them symbolic; ``act`` is the model's activation dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fairy_compile.artifact.schema import MapOf, OneOf, check, show
from fairy_compile.artifact.signature import Signature, Value
from fairy_compile.errors import ModelFileError

CHAT_FUNCTIONS = {
    "_metadata": "-> string",
    "embed": "(n) int32, params -> (n, h) act",
    "prefill": "(1, n, h) act, object, params -> [(1, 1, v) float32, object]",
    "batch_prefill": "(1, n, h) act, (b) int32, object, params -> [(1, b, v) float32, object]",
    "decode": "(1, 1, h) act, object, params -> [(1, 1, v) float32, object]",
    "batch_decode": "(b, 1, h) act, object, params -> [(b, 1, v) float32, object]",
    # max sequences, max total tokens, prefill chunk, page size, support sliding window
    "create_tir_paged_kv_cache": "shape, shape, shape, shape, shape -> object",
    "alloc_embedding_tensor": "-> (rows, h) act",
    "softmax_with_temperature": "(b, 1, v) float32, (b) float32 -> (b, 1, v) float32",
    # logits, row of each entry, token, bias
    "apply_logit_bias_inplace": "(b, v) float32, (k) int32, (k) int32, (k) float32 -> none",
    # logits, sequence ids, sequence of each entry, token, count, (presence, frequency, repetition)
    "apply_penalty_inplace": (
        "(b, v) float32, (s) int32, (k) int32, (k) int32, (k) int32, (s, 3) float32 -> none"
    ),
    # logits, rows, one bit a token
    "apply_bitmask_inplace": "(b, v) float32, (s) int32, (b, words) int32 -> none",
}
"""Functions every chat model must have."""

GPU_SAMPLER_FUNCTIONS = {
    "multinomial_from_uniform": "(b, v) float32, (s) float32, (s) int32 -> (s) int32",
    "argsort_probs": "(b, v) float32 -> [(b, v) float32, (b, v) int32]",
    "sample_with_top_p": (
        "(b, v) float32, (b, v) int32, (s) float32, (s) int32, (b) float32 -> (s) int32"
    ),
    "sampler_take_probs": (
        "(b, v) float32, (b, v) int32, (s) int32, (s) int32, (k) int32 "
        "-> [(s) float32, (k) float32, (k) int32]"
    ),
    "renormalize_by_top_p": "(b, v) float32, (b) float32, (b, 3) float32 -> (b, v) float32",
}
"""Also called by the engine's GPU sampler."""

EXACT_DECODE = "batch_decode_exact"
"""Our own, which no MLC engine calls: ``batch_decode`` with the results of ``decode``."""

ALLOC_PAGES = "alloc_pages"
PREFILL_PAGES, DECODE_PAGES, BATCH_DECODE_PAGES = (
    "batch_prefill_pages",
    "decode_pages",
    "batch_decode_pages",
)
PAGE_FUNCTIONS = (ALLOC_PAGES, PREFILL_PAGES, DECODE_PAGES, BATCH_DECODE_PAGES)
"""Our own, too: functions whose KV cache is an argument, see `models.page_tables`."""

# Tokens, positions, places, table of pages (its borders, its pages), keys in last pages, offsets.
_TABLES = "({n}) int32, ({n}) int32, ({n}) int32, ({e}) int32, (t) int32, ({b}) int32, ({b}) int32"

OPTIONAL_FUNCTIONS = {
    EXACT_DECODE: CHAT_FUNCTIONS["batch_decode"],
    # Further rows that get logits, and borders of sequences among the rows.
    PREFILL_PAGES: (
        f"{_TABLES.format(n='n', e='e', b='b')}, (r) int32, (e) int32, params, params "
        "-> [(1, r, v) float32]"
    ),
    DECODE_PAGES: f"{_TABLES.format(n=1, e=2, b=1)}, params, params -> [(1, 1, v) float32]",
    BATCH_DECODE_PAGES: (
        f"{_TABLES.format(n='b', e='e', b='b')}, params, params -> [(b, 1, v) float32]"
    ),
    "batch_verify": "(1, n, h) act, object, params -> [(1, n, v) float32, object]",
    "extend": CHAT_FUNCTIONS["prefill"],
    "batch_extend": CHAT_FUNCTIONS["batch_prefill"],
    "gather_probs": "(m, v) float32, (b) int32, (b, v) float32 -> none",
    "scatter_probs": "(b, v) float32, (b) int32, (m, v) float32 -> none",
    "sampler_verify_draft_tokens": (
        "(n, v) float32, (n) int32, (n, v) float32, (n) int32, (n) int32, (n) float32, (b) int32 "
        "-> none"
    ),
}
"""Checked where a library has them."""

DRAFT_DEVICES = ("cuda", "metal", "vulkan")
"""Kinds of devices on which an engine verifies the tokens of a draft model.

On others it samples on the host, which it cannot do for several tokens of one sequence.
"""

FORBIDDEN_FUNCTIONS = {
    "create_rnn_state": "the engine would take it in place of the KV cache",
}

_WEB = (
    "_metadata",
    "embed",
    "prefill",
    "decode",
    "create_tir_paged_kv_cache",
    "softmax_with_temperature",
    "apply_logit_bias_inplace",
    "apply_penalty_inplace",
    "apply_bitmask_inplace",
)

REQUIRED_FUNCTIONS: dict[str, dict[str, str]] = {
    "cpu": CHAT_FUNCTIONS,
    "rocm": CHAT_FUNCTIONS,
    "opencl": CHAT_FUNCTIONS,
    "cuda": CHAT_FUNCTIONS | GPU_SAMPLER_FUNCTIONS,
    "vulkan": CHAT_FUNCTIONS | GPU_SAMPLER_FUNCTIONS,
    "metal": CHAT_FUNCTIONS | GPU_SAMPLER_FUNCTIONS,
    "webgpu": {name: CHAT_FUNCTIONS[name] for name in _WEB}
    | {name: GPU_SAMPLER_FUNCTIONS[name] for name in ("argsort_probs", "sample_with_top_p")},
}
"""Device kind -> name -> signature. A new kind of device is a new entry."""

METADATA = {
    "model_type": str,
    "quantization": str,
    "context_window_size": int,
    "prefill_chunk_size": int,
    "max_batch_size": int,
    "tensor_parallel_shards": 1,
    # The engine leaves these two uninitialised when they are absent.
    "sliding_window_size": int,
    "attention_sink_size": int,
    "params": [{"name": str, "shape": [OneOf(int, str)], "dtype": str, "preprocs": list}],
    "memory_usage": MapOf(int),
    "kv_cache": {
        "num_hidden_layers": int,
        "num_attention_heads": int,
        "num_key_value_heads": int,
        "head_dim": int,
    },
    "kv_state_kind?": "kv_cache",
    "pipeline_parallel_stages?": int,
    "seqlen_padding_factor?": int,
    "disaggregation?": bool,
    "model_task?": "chat",
    "active_vocab_size?": OneOf(int, None),
}
"""Schema of the JSON text that ``_metadata`` returns."""

CONV_TEMPLATE = {
    "name": str,
    "system_template": str,
    "system_message": str,
    "add_role_after_system_message": bool,
    "roles": MapOf(str),
    "role_templates": MapOf(str),
    "messages": [list],
    "seps": [str],
    "role_content_sep": str,
    "role_empty_sep": str,
    "stop_str": [str],
    "stop_token_ids": [int],
    "system_prefix_token_ids": [int],
    "function_string": str,
    "use_function_calling": bool,
    "strip_reasoning_in_history": bool,
}

CHAT_CONFIG = {
    "version": str,
    "model_type": str,
    "quantization": str,
    "model_config": {"vocab_size": int, "prefill_chunk_size": int},
    "vocab_size": int,
    "active_vocab_size": int,
    "context_window_size": int,
    "sliding_window_size": int,
    "prefill_chunk_size": int,
    "attention_sink_size": int,
    "tensor_parallel_shards": 1,
    "pipeline_parallel_stages": 1,
    "temperature": float,
    "top_p": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "repetition_penalty": float,
    "tokenizer_files": [str],
    "tokenizer_info": {
        "token_postproc_method": OneOf("byte_fallback", "byte_level"),
        "prepend_space_in_encode": bool,
        "strip_space_in_decode": bool,
    },
    "conv_template": CONV_TEMPLATE,
    "pad_token_id": int,
    "bos_token_id": int,
    "eos_token_id": OneOf(int, [int]),
    "model_task": "chat",
    "embedding_metadata": None,
}
"""Schema of ``mlc-chat-config.json``: every key that some MLC consumer reads."""

_WEB_DTYPES = ("float16", "float32", "int32", "uint32")
_ACTIVATIONS = ("float16", "bfloat16", "float32")


@dataclass
class _Binding:
    """Values of the symbols that are one and the same in the whole library."""

    values: dict[str, int | str] = field(default_factory=dict)

    def disagree(self, symbol: str, value: int | str) -> bool:
        return self.values.setdefault(symbol, value) != value


def check_library(
    functions: Mapping[str, Signature | str],
    metadata: Mapping[str, Any],
    kind: str = "cpu",
    vocab_size: int | None = None,
) -> list[str]:
    """Return how a library breaks the contract, in words; an empty list if it keeps it.

    Args:
        functions: name -> signature of the library's public functions.
        metadata: what ``_metadata`` returns, parsed.
        kind: device kind, a key of `REQUIRED_FUNCTIONS`.
        vocab_size: of ``mlc-chat-config.json``, to be compared with the logits.
    """
    required = REQUIRED_FUNCTIONS.get(kind)
    if required is None:
        return [f"unknown device kind {show(kind)}; known: {', '.join(REQUIRED_FUNCTIONS)}"]
    problems = [
        f"the library lacks the function {name!r}" for name in required if name not in functions
    ]
    problems += [
        f"the library has a function {name!r}: {reason}"
        for name, reason in FORBIDDEN_FUNCTIONS.items()
        if name in functions
    ]
    binding = _Binding({} if vocab_size is None else {"v": vocab_size})
    for name, text in (OPTIONAL_FUNCTIONS | required).items():
        if name not in functions:
            continue
        have = functions[name]
        try:
            have = Signature.parse(have) if isinstance(have, str) else have
        except ModelFileError as error:
            problems.append(f"function {name!r}: {error}")
            continue
        problem = _signature_problem(have, Signature.parse(text), binding)
        if problem:
            problems.append(f"function {name!r} {problem}; its signature is {show(str(have), 200)}")
    metadata_problems = check(metadata, METADATA, "the library's metadata")
    if not metadata_problems:
        metadata_problems = _metadata_problems(metadata, binding.values.get("rows"))
        if kind == "webgpu":
            metadata_problems += _web_problems(metadata)
    return problems + metadata_problems


def check_chat_config(config: Mapping[str, Any], kind: str = "cpu") -> list[str]:
    """Return how an ``mlc-chat-config.json`` breaks the contract, in words."""
    where = "mlc-chat-config.json"
    problems = check(config, CHAT_CONFIG, where)
    if problems:
        return problems
    for key in ("vocab_size", "prefill_chunk_size"):
        if config[key] != config["model_config"][key]:
            problems.append(
                f"{where}: {key} is {show(config[key])}, but model_config has "
                f"{show(config['model_config'][key])}"
            )
        if not 0 < config[key] < 2**31:
            problems.append(f"{where}: {key} is {show(config[key])}; expected a positive number")
    for key in ("context_window_size", "sliding_window_size"):
        if not (config[key] == -1 or 0 < config[key] < 2**31):
            problems.append(f"{where}: {key} is {show(config[key])}; expected -1 or more than 0")
    if len(config["conv_template"]["seps"]) not in (1, 2):
        problems.append(f"{where}: conv_template.seps must have 1 or 2 entries")
    for role in ("user", "assistant"):
        if role not in config["conv_template"]["roles"]:
            problems.append(f"{where}: conv_template.roles lacks {role!r}")
    windows = (config["context_window_size"], config["sliding_window_size"])
    if kind == "webgpu" and (windows[0] == -1) == (windows[1] == -1):
        problems.append(
            f"{where}: in browsers exactly one of context_window_size and sliding_window_size "
            f"is set; they are {windows[0]} and {windows[1]}"
        )
    return problems


def _metadata_problems(metadata: Mapping[str, Any], rows: int | str | None) -> list[str]:
    problems = []
    sizes = {key: metadata[key] for key in ("prefill_chunk_size", "max_batch_size")}
    sizes |= metadata["kv_cache"]
    for key, size in sizes.items():
        if isinstance(size, int) and size <= 0:
            problems.append(f"the library's metadata: {key} is {show(size)}; expected more than 0")
    for key in ("context_window_size", "sliding_window_size"):
        if not (metadata[key] == -1 or metadata[key] > 0):
            problems.append(
                f"the library's metadata: {key} is {show(metadata[key])}; expected -1 or more "
                "than 0"
            )
    if isinstance(rows, int) and rows < metadata["prefill_chunk_size"]:
        problems.append(
            f"function 'alloc_embedding_tensor' returns {rows} rows, fewer than the metadata's "
            f"prefill_chunk_size {metadata['prefill_chunk_size']}"
        )
    return problems


def _web_problems(metadata: Mapping[str, Any]) -> list[str]:
    """Return which parameters no shader can read: WGSL has no 8-bit or 16-bit integers."""
    return [
        f"the library's metadata: parameter {show(param['name'])} is {show(param['dtype'])}; "
        f"browsers have {', '.join(_WEB_DTYPES)}"
        for param in metadata["params"]
        if param["dtype"] not in _WEB_DTYPES
    ]


def _signature_problem(have: Signature, want: Signature, binding: _Binding) -> str | None:
    if len(have.args) != len(want.args):
        return f"takes {len(have.args)} arguments; the engine passes {len(want.args)}"
    for i, (have_arg, want_arg) in enumerate(zip(have.args, want.args, strict=True)):
        problem = _value_problem(have_arg, want_arg, binding)
        if problem:
            return f"takes as argument {i} {problem}"
    if want.result.kind == "none":
        return None  # it works in place, whatever it returns is dropped
    problem = _value_problem(have.result, want.result, binding)
    return f"returns {problem}" if problem else None


def _value_problem(have: Value, want: Value, binding: _Binding) -> str | None:
    wrong = f"{have}, not {want}"
    if want.kind == "tuple":
        if have.kind != "tuple" or len(have.items) != len(want.items):
            return wrong
        for have_item, want_item in zip(have.items, want.items, strict=True):
            problem = _value_problem(have_item, want_item, binding)
            if problem:
                return problem
        return None
    if want.kind == "params":
        return None if have.kind == "params" else wrong
    if want.kind != "tensor":
        # A Relax function may declare a string or a shape as an object of unknown type.
        return None if have.kind in (want.kind, "object") else wrong
    if have.kind != "tensor" or len(have.dims) != len(want.dims):
        return wrong
    if want.dtype == "act":
        if have.dtype not in _ACTIVATIONS or binding.disagree("act", have.dtype):
            return f"{wrong}, with act = {binding.values.get('act', 'a float type')}"
    elif have.dtype != want.dtype:
        return wrong
    for have_dim, want_dim in zip(have.dims, want.dims, strict=True):
        problem = _dim_problem(have_dim, want_dim, binding)
        if problem is not None:
            return f"{wrong}{problem}"
    return None


def _dim_problem(have: int | str, want: int | str, binding: _Binding) -> str | None:
    """Return None if a dimension fits, else what to add to the message."""
    if isinstance(want, int):
        return None if have == want else ""
    if want in ("h", "v", "rows"):
        if isinstance(have, int) and binding.disagree(want, have):
            return f", with {want} = {binding.values[want]}"
        return None
    if want == "words":
        v = binding.values.get("v")
        wrong = isinstance(have, int) and isinstance(v, int) and have != -(-v // 32)
        return f", with words = ceil({v} / 32)" if wrong else None
    return f", with {want} not fixed" if isinstance(have, int) else None
