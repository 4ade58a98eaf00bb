"""llama.cpp in a process of its own: one model, JSON lines in and out.

A process of its own frees its memory when it ends, keeps its threads away from ours, and turns a
crash in native code into an error message. Started by `bench.llama_cpp`; reads one object a line
from stdin: first the options of `Model`, then ``{"n_prompt", "n_gen", "depth"}`` for each run.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from typing import Any, TextIO

import llama_cpp

_BATCH, _PHYSICAL_BATCH = 2048, 512  # llama-bench's defaults


class Model:
    """A loaded GGUF file, run through llama.cpp's C interface."""

    def __init__(self, path: str, threads: int, context: int, batch: int | None, tokens: list[int]):
        """Load ``path``; ``tokens`` are the ids that every run begins with."""
        self.tokens = (llama_cpp.llama_token * len(tokens))(*tokens)
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = context
        options.n_batch = batch or _BATCH
        options.n_ubatch = min(options.n_batch, _PHYSICAL_BATCH)
        options.n_threads = options.n_threads_batch = threads
        self.batch = options.n_batch
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot make a context of {context} tokens")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.length = 0

    def describe(self) -> dict[str, Any]:
        """Return the model's description and size, and what the program says of itself."""
        buffer = ctypes.create_string_buffer(256)
        llama_cpp.llama_model_desc(self.model, buffer, len(buffer))
        return {
            "description": buffer.value.decode(),
            "size_bytes": int(llama_cpp.llama_model_size(self.model)),
            "version": llama_cpp.__version__,
            "system": llama_cpp.llama_print_system_info().decode().strip(),
        }

    def run(self, n_prompt: int, n_gen: int, depth: int) -> float:
        """Run one workload and return the seconds of its timed part."""
        self._at_depth(depth)
        start = time.perf_counter()
        self._decode(n_prompt, self.batch)
        self._decode(n_gen, 1)
        llama_cpp.llama_synchronize(self.context)
        return time.perf_counter() - start

    def _at_depth(self, depth: int) -> None:
        if 0 < depth <= self.length:
            llama_cpp.llama_memory_seq_rm(self.memory, 0, depth, -1)
        else:
            llama_cpp.llama_memory_clear(self.memory, True)
            self.length = 0
            self._decode(depth, self.batch)
        llama_cpp.llama_synchronize(self.context)
        self.length = depth

    def _decode(self, count: int, batch: int) -> None:
        for start in range(0, count, batch):
            part = min(batch, count - start)
            offset = start * ctypes.sizeof(llama_cpp.llama_token)
            view = (llama_cpp.llama_token * part).from_buffer(self.tokens, offset)
            request = llama_cpp.llama_batch_get_one(view, part)
            status = llama_cpp.llama_decode(self.context, request)
            if status:
                raise RuntimeError(f"llama_decode returned {status}")
            if batch == 1:  # a sampler would wait for the logits before the next token
                llama_cpp.llama_synchronize(self.context)
            self.length += part


def serve(requests: TextIO, replies: TextIO) -> None:
    """Answer requests until there are no more."""

    def reply(value: dict[str, Any]) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    model = Model(**json.loads(requests.readline()))
    reply(model.describe())
    for line in requests:
        reply({"seconds": model.run(**json.loads(line))})


def main() -> None:
    """Serve on the real stdout; whatever native code prints goes to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    llama_cpp.llama_backend_init()
    serve(sys.stdin, replies)


if __name__ == "__main__":
    main()
