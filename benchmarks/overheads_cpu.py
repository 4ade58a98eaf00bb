"""What a decode step pays besides streaming weights: launches and quantisation of activations.

Prints the medians of

- a call of a compiled function that does next to nothing,
- the same with a parallel loop, so that the pool's threads wake, work and meet again,
- the phase calls of a LLaMA-2-7B layer with one tile of rows left: all of quantising x, and the
  launch, but hardly any weights; beside the whole calls, in alternating rounds.

    python benchmarks/overheads_cpu.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import tvm
import typer
from kernel_x86 import CALLS
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from fairy_compile.kernels.base import Batch
from fairy_compile.kernels.x86 import CODEBOOK_KERNELS, X86Codebook
from fairy_compile.op import PhaseSpec
from fairy_compile.runtime.host_memory import allocate_parts
from fairy_compile.runtime.threads import set_threads
from fairy_compile.targets import Target, load_target

BATCH: Batch = "single"
TILE_ROWS = 16  # the fewest rows a kernel computes


def writes(count: int, parallel: bool, target: Target) -> Callable[[Any], None]:
    """Compile a function that stores ``count`` numbers."""
    with IRBuilder() as ir, T.prim_func(s_tir=True):
        T.func_name("writes")
        out = T.arg("out", T.buffer((count, 16), "int32"))
        with (T.parallel if parallel else T.serial)(0, count) as i:
            T.buffer_store(out, i, [i, 0])
    return tvm.compile(ir.get(), target=target.to_tvm())["writes"]


def median_us(call: Callable[[], None], rounds: int) -> float:
    """Return the median time of a call in microseconds, threads awake."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def phase_call(
    kernel: X86Codebook, target: Target, rows: tuple[int, ...], m: int, stages: int
) -> Callable[[], None]:
    """Return a call of the kernel on one row of x and weights of arbitrary codes."""
    spec = PhaseSpec(rows, m, stages, ("U", "W"), "tensor", "int8")
    function = kernel.build(spec, target, BATCH, {})
    call = tvm.compile(function, target=target.to_tvm())[function.attrs["global_symbol"]]
    rng = np.random.default_rng(0)
    kinds = list(kernel.layout.arrays(spec).values())
    packed = []
    for kind, memory in zip(kinds, allocate_parts([k.nbytes for k in kinds]), strict=True):
        array = memory.view(kind.dtype).reshape(kind.shape)
        array[...] = rng.integers(0, 3, kind.shape, np.uint8)
        packed.append(tvm.runtime.from_dlpack(array))
    x = tvm.runtime.tensor(rng.standard_normal((1, 2 * m)).astype(np.float32))
    y = tvm.runtime.tensor(np.zeros((1, spec.out_features), np.float32))
    return lambda: call(x, *packed, y)


def main(
    rounds: Annotated[int, typer.Option(help="Timed calls of everything.", min=2)] = 200,
    stages: Annotated[int, typer.Option(help="T, bits per weight.")] = 2,
    threads: Annotated[int | None, typer.Option(help="Default: the physical cores.")] = None,
) -> None:
    """Time the overheads on this machine."""
    used = set_threads(threads)
    target = load_target("cpu")
    out = tvm.runtime.tensor(np.zeros((used, 16), np.int32))
    for name, parallel in (("call", False), ("call with a parallel launch", True)):
        function = writes(used, parallel, target)
        print(f"{name:32s} {median_us(lambda f=function: f(out), 20 * rounds):8.2f} us")
    spec = PhaseSpec((2048,), 2048, stages, ("U", "W"), "tensor", "int8")
    kernel = next(k for k in CODEBOOK_KERNELS if k.unsupported(spec, target) is None)
    whole, tile = 0.0, 0.0
    for rows, m in CALLS:
        calls = [phase_call(kernel, target, r, m, stages) for r in (rows, (TILE_ROWS,))]
        full, small = (median_us(call, rounds) for call in calls)
        print(f"n={'+'.join(map(str, rows)):16s} m={m}: {full:8.1f} us; one tile {small:6.1f} us")
        whole, tile = whole + full, tile + small
    print(
        f"{kernel.name}, T={stages}, {used} threads: quantising x and launching take at most "
        f"{tile:.1f} of {whole:.1f} us a layer, {tile / whole:.1%} "
        "(these weights may stay in cache)"
    )


if __name__ == "__main__":
    typer.run(main)
