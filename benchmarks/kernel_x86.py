"""Speed of the x86 codebook kernels on the matrices of a LLaMA-2-7B layer.

Streams the packed weights of several layers, so that they come from memory.

Decode, one row at a time (b = 1): prints GB/s of packed weights beside a plain read of the same
bytes with the same threads in the same run. Rounds alternate between kernels and the plain read,
because machines drift.

Prefill, ``--batch`` rows: prints ms a layer, tokens per second of 32 layers (matrix products and
quantisation of activations only), and int8 TOPS, counting the 8 operations of a complex weight's
real 2 x 2 block per token however many the kernel takes. Rounds alternate between kernels.

    python benchmarks/kernel_x86.py --rounds 15
    python benchmarks/kernel_x86.py --batch 128 --rounds 7
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated

import numpy as np
import tvm
import typer

from fairy_compile.bench.bandwidth import ReadBandwidth
from fairy_compile.compiler.schedules import knobs_for, load_knobs
from fairy_compile.kernels.x86 import CODEBOOK_KERNELS, X86Codebook
from fairy_compile.op import PhaseSpec
from fairy_compile.runtime.host_memory import allocate_parts
from fairy_compile.runtime.threads import set_threads
from fairy_compile.targets import Target, load_target

# (complex rows of the fused parts, complex columns): q/k/v, o, gate/up, down.
CALLS = [((2048, 2048, 2048), 2048), ((2048,), 2048), ((5504, 5504), 2048), ((2048,), 5504)]


def layer_calls(
    kernel: X86Codebook, target: Target, mode: str, like: PhaseSpec, layers: int, batch: int
) -> tuple[Callable[[], None], int]:
    """Return a function that runs all calls of ``layers`` layers once, and the bytes it reads."""
    rng = np.random.default_rng(0)
    specs = [replace(like, parts=parts, m=m) for parts, m in CALLS]
    kinds = [list(kernel.layout.arrays(spec).values()) for spec in specs]
    # One block, as a loaded model has, so that all of it can lie on huge pages.
    memory = iter(allocate_parts([k.nbytes for call in kinds * layers for k in call]))
    calls = []
    batch_class, knob = ("single", "tables") if batch == 1 else ("many", "panels")
    knobs = knobs_for(kernel, batch_class, load_knobs(target)) | {knob: mode}
    for spec in specs:
        function = kernel.build(spec, target, batch_class, knobs)
        library = tvm.compile(function, target=target.to_tvm())
        calls.append(library[function.attrs["global_symbol"]])
    jobs, size = [], 0
    for spec, call, arrays in zip(specs * layers, calls * layers, kinds * layers, strict=True):
        x = tvm.runtime.tensor(rng.standard_normal((batch, 2 * spec.m)).astype(np.float32))
        y = tvm.runtime.tensor(np.zeros((batch, spec.out_features), np.float32))
        packed = []
        for kind in arrays:
            array = next(memory).view(kind.dtype).reshape(kind.shape)
            array[...] = rng.integers(0, 3, kind.shape, np.uint8)
            packed.append(tvm.runtime.from_dlpack(array))
            size += array.nbytes
        jobs.append((call, (x, *packed, y)))

    def run() -> None:
        for call, arguments in jobs:
            call(*arguments)

    return run, size


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def modes(kernel: X86Codebook, spec: PhaseSpec, batch: int) -> list[str]:
    """Return the table modes that differ for this call and batch."""
    batch_class, knob = ("single", "tables") if batch == 1 else ("many", "panels")
    asked = kernel.knobs[knob]
    return [m for m in asked if kernel.table_mode(spec, batch_class, {knob: m}) == m]


def decode(
    kernels: Sequence[X86Codebook], target: Target, spec: PhaseSpec, rounds: int, layers: int
) -> None:
    """Print GB/s per kernel and table mode, and the share of plain read bandwidth."""
    plain_read = ReadBandwidth(layers * 50_000_000)
    for kernel in kernels:
        for mode in modes(kernel, spec, 1):
            run, size = layer_calls(kernel, target, mode, spec, layers, 1)
            run()
            ours, plain = [], []
            for _ in range(rounds):
                plain.append(plain_read.measure() / 1e9)
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


def prefill(
    kernels: Sequence[X86Codebook],
    target: Target,
    spec: PhaseSpec,
    rounds: int,
    layers: int,
    batch: int,
) -> None:
    """Print ms a layer, tokens per second and TOPS per kernel and table mode."""
    runs = {
        (kernel.name, mode): layer_calls(kernel, target, mode, spec, layers, batch)[0]
        for kernel in kernels
        for mode in modes(kernel, spec, batch)
    }
    for run in runs.values():
        run()
    taken: dict[tuple[str, str], list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            taken[name].append(seconds(run) / layers)
    operations = 8 * batch * sum(sum(parts) * m for parts, m in CALLS)
    for (kernel, mode), times in taken.items():
        best, median = min(times), statistics.median(times)
        print(
            f"{kernel:26s} {mode:8s} {best * 1e3:7.1f} / {median * 1e3:7.1f} ± "
            f"{statistics.stdev(times) * 1e3:5.1f} ms a layer   {batch / best / 32:6.1f} / "
            f"{batch / median / 32:6.1f} tokens/s   {operations / best / 1e12:5.2f} TOPS"
        )


def main(
    rounds: Annotated[int, typer.Option(help="Timed rounds of every kernel.", min=2)] = 15,
    layers: Annotated[int, typer.Option(help="Layers streamed in a round.")] = 4,
    stages: Annotated[int, typer.Option(help="T, bits per weight.")] = 2,
    isa: Annotated[str, typer.Option(help="Only kernels whose name contains this.")] = "",
    threads: Annotated[int | None, typer.Option(help="Default: the physical cores.")] = None,
    batch: Annotated[int, typer.Option(help="Rows of x: 1 for decode, more for prefill.")] = 1,
    act: Annotated[str, typer.Option(help="int8 or int16.")] = "int8",
    scale: Annotated[str, typer.Option(help="tensor, row or tile64.")] = "tensor",
) -> None:
    """Time the kernels this machine can run."""
    used = set_threads(threads)
    target = load_target("cpu")
    spec = PhaseSpec((2048,), 2048, stages, ("U", "W"), scale, act)
    kernels = [k for k in CODEBOOK_KERNELS if isa in k.name and k.unsupported(spec, target) is None]
    if not kernels:
        sys.exit(f"no kernel named like {isa!r} runs here: {[k.name for k in CODEBOOK_KERNELS]}")
    print(
        f"{rounds} rounds of {layers} layers, T={stages}, {scale}, {act}, b={batch}, {used} "
        f"threads; {'GB/s, ' if batch == 1 else ''}best / median ± deviation"
    )
    if batch == 1:
        # The decode kernel of AMX machines is that of AVX512-VBMI.
        decode([k for k in kernels if not k.isa.amx], target, spec, rounds, layers)
    else:
        prefill(kernels, target, spec, rounds, layers, batch)


if __name__ == "__main__":
    typer.run(main)
