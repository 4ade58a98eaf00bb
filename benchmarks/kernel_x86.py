"""Decode speed of the x86 codebook kernels on the matrices of a LLaMA-2-7B layer.

Streams the packed weights of several layers, so that they come from memory, one row at a time
(b = 1), and prints GB/s of packed weights beside a plain read of the same bytes with the same
threads in the same run. Rounds alternate between kernels and the plain read, because machines
drift.

    python benchmarks/kernel_x86.py --rounds 15
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import tvm
import typer
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from fairy_compile.kernels.x86 import CODEBOOK_KERNELS, X86Codebook
from fairy_compile.op import PhaseSpec
from fairy_compile.runtime.threads import set_threads
from fairy_compile.targets import Target, load_target

# (complex rows of the fused parts, complex columns): q/k/v, o, gate/up, down.
CALLS = [((2048, 2048, 2048), 2048), ((2048,), 2048), ((5504, 5504), 2048), ((2048,), 5504)]


def plain_read(target: Target) -> Callable[[Any, Any], None]:
    """Compile a read of uint64 (chunks, words): sums of each chunk, spread over all threads."""
    lanes, ways = 8, 4
    with IRBuilder() as ir, T.prim_func(s_tir=True):
        T.func_name("plain_read")
        T.func_attr({"tirx.noalias": True})
        chunks, words = T.int64(), T.int64()
        data = T.arg("data", T.buffer((chunks, words), "uint64"))
        out = T.arg("out", T.buffer((chunks, ways * lanes), "uint64"))
        with T.parallel(0, chunks) as c:
            sums = [T.alloc_buffer((lanes,), "uint64") for _ in range(ways)]
            at = T.ramp(0, 1, lanes)
            for s in sums:
                T.buffer_store(s, T.broadcast(T.uint64(0), lanes), [at])
            with T.serial(0, words // (ways * lanes)) as i:
                for k, s in enumerate(sums):
                    value = data[c, T.ramp((i * ways + k) * lanes, 1, lanes)]
                    T.buffer_store(s, s[at] + value, [at])
            for k, s in enumerate(sums):
                T.buffer_store(out, s[at], [c, T.ramp(k * lanes, 1, lanes)])
    return tvm.compile(ir.get(), target=target.to_tvm())["plain_read"]


def layer_calls(
    kernel: X86Codebook, target: Target, mode: str, stages: int, layers: int
) -> tuple[Callable[[], None], int]:
    """Return a function that runs all calls of ``layers`` layers once, and the bytes it reads."""
    rng = np.random.default_rng(0)
    jobs, size = [], 0
    for parts, m in CALLS:
        spec = PhaseSpec(parts, m, stages, ("U", "W"), "tensor", "int8")
        function = kernel.build(spec, target, "single", {"tables": mode})
        library = tvm.compile(function, target=target.to_tvm())
        call = library[function.attrs["global_symbol"]]
        x = tvm.runtime.tensor(rng.standard_normal((1, 2 * m)).astype(np.float32))
        for _ in range(layers):
            arrays = []
            for a in kernel.layout.arrays(spec).values():
                filler = rng.integers(0, 3, a.shape, np.uint8).astype(a.dtype)
                arrays.append(tvm.runtime.tensor(filler))
                size += a.nbytes
            y = tvm.runtime.tensor(np.zeros((1, spec.out_features), np.float32))
            jobs.append((call, (x, *arrays, y)))

    def run() -> None:
        for call, arguments in jobs:
            call(*arguments)

    return run, size


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main(
    rounds: Annotated[int, typer.Option(help="Timed rounds of every kernel.")] = 15,
    layers: Annotated[int, typer.Option(help="Layers streamed in a round.")] = 4,
    stages: Annotated[int, typer.Option(help="T, bits per weight.")] = 2,
    isa: Annotated[str, typer.Option(help="Only kernels whose name contains this.")] = "",
    threads: Annotated[int | None, typer.Option(help="Default: the physical cores.")] = None,
) -> None:
    """Print GB/s per kernel and table mode, and the share of plain read bandwidth."""
    used = set_threads(threads)
    target = load_target("cpu")
    read = plain_read(target)
    spec = PhaseSpec((2048,), 2048, stages, ("U", "W"), "tensor", "int8")
    kernels = [k for k in CODEBOOK_KERNELS if isa in k.name and k.unsupported(spec, target) is None]
    if not kernels:
        sys.exit(f"no kernel named like {isa!r} runs here: {[k.name for k in CODEBOOK_KERNELS]}")
    chunks, words = 256, layers * 50_000_000 // 256 // 256 * 32
    data = tvm.runtime.tensor(np.ones((chunks, words), np.uint64))
    out = tvm.runtime.tensor(np.zeros((chunks, 32), np.uint64))
    read_bytes = chunks * words * 8
    print(f"{rounds} rounds of {layers} layers, T={stages}, b=1, {used} threads; ", end="")
    print("GB/s best / median ± deviation")
    for kernel in kernels:
        for mode in ("joint", "split"):
            knobs = {"tables": mode}
            if mode == "joint" and not kernel.uses_joint(spec, knobs):
                continue
            run, size = layer_calls(kernel, target, mode, stages, layers)
            run()
            ours, plain = [], []
            for _ in range(rounds):
                plain.append(read_bytes / seconds(lambda: read(data, out)) / 1e9)
                ours.append(size / seconds(run) / 1e9)
            share = statistics.median(a / b for a, b in zip(ours, plain, strict=True))
            print(
                f"{kernel.name:26s} {mode:5s} {max(ours):5.1f} / {statistics.median(ours):5.1f} "
                f"± {statistics.stdev(ours):4.1f}   plain read {max(plain):5.1f} / "
                f"{statistics.median(plain):5.1f} ± {statistics.stdev(plain):4.1f}   "
                f"{max(ours) / max(plain):4.0%} of best, {share:4.0%} pairwise   "
                f"{size / layers / max(ours) / 1e6:.2f} ms a layer",
                flush=True,
            )
            del run


if __name__ == "__main__":
    typer.run(main)
