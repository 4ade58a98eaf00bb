"""Decode attention on a CPU: the library's kernel beside TVM's own, at several contexts.

Reads the paged cache of several layers in turn, so that it comes from memory, with the batch of
one sequence, and prints the median time of a layer and the GB/s of keys and values, beside a plain
read of memory. Rounds of all alternate, because machines drift.

    python benchmarks/attention_cpu.py --heads 32 --kv-heads 8 --contexts 512,4096
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import tvm
import typer
from tvm.relax.frontend.nn.llm import kv_cache as stock

from fairy_compile.bench.bandwidth import compile_read
from fairy_compile.kernels.attention_cpu import AttentionShape, build_decode, vector_unit
from fairy_compile.runtime.threads import set_threads
from fairy_compile.targets import load_target

PAGE = 16


def compile_decode(shape: AttentionShape, ours: bool) -> Callable[..., None]:
    target = load_target("cpu")
    if ours:
        function = build_decode(shape, vector_unit(target))
    else:
        function = stock._attention_decode_cpu(
            shape.kv_heads, shape.heads, shape.head_dim, shape.dtype, False, {}
        )
    library = tvm.compile(function.with_attr("global_symbol", "decode"), target=target.to_tvm())
    return library["decode"]


def arguments(shape: AttentionShape, context: int, layers: int) -> list[list[Any]]:
    """Return the arguments of each layer's call, pages in random order."""
    rng = np.random.default_rng(0)
    count = -(-context // PAGE)
    row = (1, shape.heads, shape.head_dim)
    zero = np.zeros(1, np.int32)
    calls = []
    for _ in range(layers):
        pages = np.empty((count, 2, shape.kv_heads, PAGE, shape.head_dim), shape.dtype)
        pages[:] = rng.standard_normal(pages.shape[1:])
        arrays = [
            rng.standard_normal(row).astype(shape.dtype),
            pages,
            np.array([0, count], np.int32),
            rng.permutation(count).astype(np.int32),
            np.array([(context - 1) % PAGE + 1], np.int32),
            zero,
            zero,
            np.zeros(row, shape.dtype),
            np.zeros(row[:2], np.float32),
        ]
        tensors = [tvm.runtime.tensor(a) for a in arrays]
        calls.append([*tensors, 0, 1.0, 1e4, shape.head_dim**-0.5])
    return calls


def seconds(function: Callable[..., None], calls: list[list[Any]], repeat: int) -> float:
    """Return the time of one call."""
    start = time.perf_counter()
    for _ in range(repeat):
        for call in calls:
            function(*call)
    return (time.perf_counter() - start) / (repeat * len(calls))


def main(
    heads: Annotated[int, typer.Option(help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(help="Key/value heads.")] = 32,
    head_dim: Annotated[int, typer.Option(help="Elements of a head.")] = 128,
    contexts: Annotated[str, typer.Option(help="Context lengths.")] = "16,512,4096",
    megabytes: Annotated[int, typer.Option(help="Keys and values streamed in a round.")] = 256,
    rounds: Annotated[int, typer.Option(help="Timed rounds of each kernel.")] = 9,
    threads: Annotated[int | None, typer.Option(help="Default: the physical cores.")] = None,
) -> None:
    """Print microseconds per layer: TVM's kernel with float32, ours with float32 and float16."""
    used = set_threads(threads)
    print(f"{heads}/{kv_heads} heads of {head_dim}, batch 1, {used} threads; medians of {rounds}")
    kinds = {"TVM float32": ("float32", False), "float32": ("float32", True)}
    kinds["float16"] = ("float16", True)
    shapes = {k: AttentionShape(heads, kv_heads, head_dim, d) for k, (d, _) in kinds.items()}
    functions = {k: compile_decode(shapes[k], ours) for k, (_, ours) in kinds.items()}
    read = compile_read(load_target("cpu"))
    data = tvm.runtime.tensor(np.ones((256, megabytes << 9), np.uint64))
    sums = tvm.runtime.tensor(np.zeros((256, 32), np.uint64))
    for context in map(int, contexts.split(",")):
        work, size = {}, {}
        for kind, shape in shapes.items():
            size[kind] = 2 * kv_heads * head_dim * context * np.dtype(shape.dtype).itemsize
            # The library's runs read what does not fit a cache; TVM's takes seconds for that.
            layers = 1 if "TVM" in kind else max(2, min(32, (megabytes << 20) // size[kind]))
            work[kind] = arguments(shape, context, layers)
            functions[kind](*work[kind][0])
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        plain = []
        for _ in range(rounds):
            plain.append((megabytes << 20) / seconds(read, [[data, sums]], 1) / 1e9)
            for kind, function in functions.items():
                repeat = max(1, round(2000 / context)) if "TVM" not in kind else 1
                times[kind].append(seconds(function, work[kind], repeat))
        for kind in kinds:
            median = statistics.median(times[kind])
            base = statistics.median(times["TVM float32"])
            print(
                f"context {context:5d}  {kind:12s} {median * 1e6:10.1f} us a layer "
                f"(best {min(times[kind]) * 1e6:10.1f})  {size[kind] / median / 1e9:6.2f} GB/s  "
                f"{base / median:7.1f} x TVM",
                flush=True,
            )
        print(f"context {context:5d}  plain read of memory {statistics.median(plain):6.2f} GB/s")


if __name__ == "__main__":
    typer.run(main)
