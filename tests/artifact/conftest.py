"""A tiny valid artifact, made with the package's own writers, and ways to damage it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairy_compile.artifact import (
    EngineSizes,
    LayerEntry,
    Manifest,
    ModelInfo,
    ParamEntry,
    ParamWriter,
    Source,
    TargetInfo,
    chat_config,
    describe_files,
)
from fairy_compile.artifact.contract import CHAT_FUNCTIONS

SIZES = {"h": "4", "v": "32", "rows": "16", "words": "1", "act": "float32"}


def concrete(signature: str) -> str:
    """Put the sizes of the tiny model into a signature of the contract."""
    return re.sub(r"\b(h|v|rows|words|act)\b", lambda m: SIZES[m[0]], signature)


def tiny_tokenizer() -> dict[str, Any]:
    vocab = {"<s>": 0, "</s>": 1, **{f"t{i}": i for i in range(2, 32)}}
    return {
        "added_tokens": [
            {"id": 0, "content": "<s>", "special": True},
            {"id": 1, "content": "</s>", "special": True},
        ],
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
        "decoder": {"type": "ByteLevel"},
    }


class TinyArtifact:
    """An artifact directory whose files can be edited with the manifest kept in step."""

    def __init__(self, directory: Path):
        self.directory = directory

    def read(self, name: str = "fairy.json") -> Any:
        return json.loads((self.directory / name).read_text())

    def edit(self, name: str, change: Callable[[Any], Any]) -> None:
        """Change a JSON file in place and record its new size and hash."""
        value = self.read(name)
        change(value)
        (self.directory / name).write_text(json.dumps(value))
        if name != "fairy.json":
            self.sign(name)

    def edit_manifest(self, change: Callable[[Any], Any]) -> None:
        self.edit("fairy.json", change)

    def sign(self, name: str) -> None:
        """Record the present size and hash of ``name``."""
        entry = describe_files(self.directory, [name])[name]
        record = {"bytes": entry.bytes, "sha256": entry.sha256}
        self.edit_manifest(lambda m: m["files"].update({name: record}))


def tiny_params() -> dict[str, tuple[np.ndarray, ParamEntry]]:
    arrays = {
        "embed": (np.ones((32, 4), np.float16), "embedding", 0),
        "layer.codes": (np.full((2, 2, 2, 1), 0x0F, np.uint8), "codes", 0xF0),
        "layer.scales": (np.full((2, 2), 0.5, np.float32), "scales", 0),
        "norm": (np.ones(4, np.float32), "norm", 0),
    }
    return {
        name: (array, ParamEntry(name, array.shape, array.dtype.name, role, unused))
        for name, (array, role, unused) in arrays.items()
    }


def write_tiny(directory: Path) -> TinyArtifact:
    params = tiny_params()
    writer = ParamWriter(directory)
    writer.add_all((name, array) for name, (array, _) in params.items())
    written = writer.finish({"BitsPerParam": 2.0})
    entries = tuple(entry for _, entry in params.values())
    (directory / "lib.so").write_bytes(b"not really a library")
    (directory / "tokenizer.json").write_text(json.dumps(tiny_tokenizer()))
    sizes = EngineSizes(32, 64, 16, 4)
    config = chat_config(directory, {}, sizes, model_type="llama", quantization="fairy-w2")
    config.write(directory)
    metadata = {
        "model_type": "llama",
        "quantization": "fairy-w2",
        "context_window_size": 64,
        "prefill_chunk_size": 16,
        "max_batch_size": 4,
        "tensor_parallel_shards": 1,
        "sliding_window_size": -1,
        "attention_sink_size": -1,
        "params": [
            {"name": e.name, "shape": list(e.shape), "dtype": e.dtype, "preprocs": []}
            for e in entries
        ],
        "memory_usage": {},
        "kv_cache": {
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 4,
        },
    }
    files = describe_files(directory, [p.name for p in directory.iterdir()], known=written.files)
    layer = LayerEntry(
        "layer", "generic", "plain", 24, "only kernel", 2, "UW", "tensor", shape=(4, 8)
    )
    Manifest(
        fairy_compile="0.1.0",
        tvm=version("apache-tvm"),
        tvm_ffi=version("apache-tvm-ffi"),
        source=Source("huggingface", "tiny", {"config.json": "0" * 64}),
        quant={"quant": "w2", "scale": "tensor", "act": "float", "method": "phase"},
        target=TargetInfo("cpu", "cpu", "llvm", ("avx2",)),
        model=ModelInfo("llama", {"vocab_size": 32}),
        files=files,
        layers=(layer,),
        params=entries,
        library="lib.so",
        functions={name: concrete(text) for name, text in CHAT_FUNCTIONS.items()},
        metadata=metadata,
    ).write(directory)
    return TinyArtifact(directory)


@pytest.fixture
def artifact(tmp_path: Path) -> TinyArtifact:
    directory = tmp_path / "artifact"
    directory.mkdir()
    return write_tiny(directory)
