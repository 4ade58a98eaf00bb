"""``mlc-chat-config.json``: every key that MLC's own generator writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairy_compile.artifact.conv_template import derive_conv_template
from fairy_compile.artifact.schema import dump_json, load_object
from fairy_compile.artifact.tokenizer_files import TokenizerFiles

MLC_CHAT_CONFIG = "mlc-chat-config.json"
MLC_CONFIG_VERSION = "0.1.0"

_SYSTEM_DEFAULTS: dict[str, Any] = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "temperature": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "top_p": 1.0,
}
"""What MLC writes for values that no file of the model gives."""


@dataclass(frozen=True)
class EngineSizes:
    """Sizes the library was compiled for.

    Attributes:
        vocab_size: last dimension of the logits.
        context_window_size: most tokens of one sequence.
        prefill_chunk_size: most tokens of one prefill call.
        max_batch_size: most sequences of one decode call.
    """

    vocab_size: int
    context_window_size: int
    prefill_chunk_size: int
    max_batch_size: int


@dataclass(frozen=True)
class ChatConfig:
    """An ``mlc-chat-config.json`` and what to tell the user about it.

    Attributes:
        config: the JSON object.
        conv_template_reason: why the conversation template is the plain one, or ``""``.
    """

    config: dict[str, Any]
    conv_template_reason: str

    def write(self, directory: Path | str) -> None:
        """Write ``mlc-chat-config.json`` into ``directory``."""
        dump_json(Path(directory) / MLC_CHAT_CONFIG, self.config)


def chat_config(
    model_directory: Path | str,
    hf_config: Mapping[str, Any],
    sizes: EngineSizes,
    *,
    model_type: str,
    quantization: str,
) -> ChatConfig:
    """Build the chat configuration of a model.

    Sampling defaults and token ids come from ``generation_config.json``, then ``config.json``,
    then the tokenizer, then MLC's defaults. The reply ends at any end-of-text id of those files
    or at the token that ends the assistant's turn in the chat template.

    Args:
        model_directory: directory with the tokenizer files and ``generation_config.json``, all
            optional.
        hf_config: parsed ``config.json``.
        sizes: sizes of the library.
        model_type: family name, e.g. ``llama``.
        quantization: name of the quantisation, e.g. ``fairy-w2``.

    Raises:
        ModelFileError: a file of the directory is malformed.
    """
    files = TokenizerFiles.read(model_directory)
    generation_path = Path(model_directory) / "generation_config.json"
    generation = load_object(generation_path) if generation_path.is_file() else {}
    defaults = {key: _first(key, generation, hf_config, files) for key in _SYSTEM_DEFAULTS}
    derived = derive_conv_template(files, stop_token_ids(generation, hf_config, files))
    windows = {
        "context_window_size": sizes.context_window_size,
        "sliding_window_size": -1,
        "prefill_chunk_size": sizes.prefill_chunk_size,
        "attention_sink_size": -1,
        "tensor_parallel_shards": 1,
        "pipeline_parallel_stages": 1,
    }
    model_config = dict(hf_config) | windows
    model_config |= {"vocab_size": sizes.vocab_size, "max_batch_size": sizes.max_batch_size}
    config = {
        "version": MLC_CONFIG_VERSION,
        "model_type": model_type,
        "quantization": quantization,
        "model_config": model_config,
        "vocab_size": sizes.vocab_size,
        "active_vocab_size": min(len(files.ids) or sizes.vocab_size, sizes.vocab_size),
        **windows,
        **{key: value for key, value in defaults.items() if not key.endswith("_token_id")},
        "tokenizer_files": files.present(),
        "tokenizer_info": files.tokenizer_info(),
        "conv_template": derived.template,
        **{key: value for key, value in defaults.items() if key.endswith("_token_id")},
        "model_task": "chat",
        "embedding_metadata": None,
    }
    return ChatConfig(config, derived.reason)


def stop_token_ids(
    generation: Mapping[str, Any], hf_config: Mapping[str, Any], files: TokenizerFiles
) -> list[int]:
    """Return the end-of-text ids that any of the model's files names, sorted."""
    ids: set[int] = set()
    for source in (generation, hf_config):
        value = source.get("eos_token_id")
        ids.update(i for i in (value if isinstance(value, list) else [value]) if _is_id(i))
    eos = files.token_id("eos_token")
    return sorted(ids if eos is None else ids | {eos})


def _first(
    key: str, generation: Mapping[str, Any], hf_config: Mapping[str, Any], files: TokenizerFiles
) -> Any:
    """Return the first usable value of ``key``; unusable ones count as missing."""
    usable = _is_token_id if key.endswith("_token_id") else _is_number
    for source in (generation, hf_config):
        if usable(source.get(key)):
            return source[key]
    if key.endswith("_token_id"):
        token = files.token_id(key.removesuffix("_id"))
        if token is not None:
            return token
    return _SYSTEM_DEFAULTS[key]


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_token_id(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(map(_is_id, value))
    return _is_id(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
