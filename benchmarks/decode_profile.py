"""Where the time of a decoded token goes: every call of a built model, at several contexts.

Decodes one token after another from a cache of the given length and times each call of the library
from inside the virtual machine. Prints microseconds a layer of each function, the share of a token
outside the phase kernels, and what the virtual machine adds between calls.

    python benchmarks/make_synthetic.py llama2-7b --layers 4 -o /tmp/llama4
    fairy_compile build /tmp/llama4 -o /tmp/artifact4
    python benchmarks/decode_profile.py /tmp/artifact4 --contexts 16,512,4000
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tvm
import typer

import fairy_compile as fc

PHASE = ("phase_gemm", "x86_", "arm_", "generic_")


def main(
    artifact: Annotated[Path, typer.Argument(help="Directory that build wrote.")],
    contexts: Annotated[str, typer.Option(help="Context lengths.")] = "16,512,4000",
    tokens: Annotated[int, typer.Option(help="Tokens decoded at each context.")] = 15,
    threads: Annotated[int | None, typer.Option(help="Default: the physical cores.")] = None,
) -> None:
    """Print medians over the decoded tokens."""
    with fc.load(artifact, threads=threads) as model:
        engine = model.engine
        layers = engine.library.metadata["kv_cache"]["num_hidden_layers"]
        sequence, length = engine.add_sequence(), 0
        for context in sorted(map(int, contexts.split(","))):
            engine.prefill(sequence, [1] * (context - length))
            whole, steps = [], []
            for _ in range(tokens):
                start = time.perf_counter()
                engine.decode([sequence], [1])
                whole.append(time.perf_counter() - start)
                steps.append(timed_calls(engine, sequence))
            length = context + 2 * tokens
            report(context, whole, steps, layers)


def timed_calls(engine: Any, sequence: int) -> dict[str, float]:
    """Decode a token in an instrumented virtual machine; return function -> seconds."""
    seconds: dict[str, float] = defaultdict(float)
    started: list[float] = []

    def on_call(_function: Any, symbol: str, before: bool, _result: Any, *_: Any) -> int:
        if before:
            started.append(time.perf_counter())
        else:
            seconds[symbol] += time.perf_counter() - started.pop()
        return 0  # VMInstrumentReturnKind.NO_OP

    library = engine.library
    machine = tvm.runtime.vm.VirtualMachine(library._executable, library.device)
    machine.set_instrument(on_call)
    with engine.cache.forward([sequence], [1]):
        name, arguments = engine.steps.decode(np.array([1], np.int32))
        machine[name](*arguments)
    return seconds


def report(context: int, whole: list[float], steps: list[dict[str, float]], layers: int) -> None:
    names = {name for calls in steps for name in calls}
    median = {n: statistics.median(c.get(n, 0.0) for c in steps) for n in names}
    inside = sum(median.values())
    phase = sum(t for n, t in median.items() if n.startswith(PHASE))
    total = statistics.median(whole)
    print(
        f"context {context}: {total * 1e3:.2f} ms a token, {inside * 1e3:.2f} ms in calls, "
        f"outside the phase kernels {1 - phase / total:.1%} of a token"
    )
    for name, seconds in sorted(median.items(), key=lambda item: -item[1]):
        if seconds / total >= 0.001:
            print(f"  {seconds / total:6.1%}  {seconds / layers * 1e6:8.1f} us a layer  {name}")


if __name__ == "__main__":
    typer.run(main)
