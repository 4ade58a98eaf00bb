"""Whole models on a CUDA GPU: phase weights beside 4-bit groups and float16, one compiler.

Two steps, so that the GPU machine needs no compiler and no weights are carried:

    python benchmarks/gpu_model.py build -o gpu-models                  # any machine with nvcc
    python benchmarks/gpu_model.py run gpu-models -o gpu-model.json     # the GPU machine

`build` compiles libraries of one shape that differ in their linear layers, see `VARIANTS`. `run`
fills their parameters with random numbers on the device. For each it first compares a prefill with
the same tokens fed one by one, which takes other kernels; one whose results disagree is not timed.
Then it times decode as an engine does it (logits come to the host, which picks the next token),
decode steps that are only queued (their time is that of the slower of GPU and CPU; with the
runtime's cache each waits for the one before), and prefill.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from gpu_variants import CHUNK, CONTEXT, MAX_BATCH, SHAPES, VARIANTS, Variant


def build(arguments: argparse.Namespace) -> None:
    """Compile the libraries, each into a folder with what to fill its parameters with."""
    from dataclasses import replace

    from gpu_model_build import build_one

    from fairy_compile.targets import load_target

    target = load_target(arguments.target)
    if arguments.arch:
        target = replace(target, extra={**target.extra, "archs": arguments.arch})
    for name in arguments.variant or VARIANTS:
        start = time.perf_counter()
        build_one(arguments.output / name, VARIANTS[name], SHAPES[arguments.shape], target)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


class Runner:
    """A library with random parameters, called as `fairy_compile.runtime.engine` calls one."""

    def __init__(self, folder: Path, device: Any) -> None:
        import tvm

        from fairy_compile.runtime.kv_cache import KVCache
        from fairy_compile.runtime.library import LibraryFile
        from fairy_compile.runtime.pinned import Downloads
        from fairy_compile.runtime.steps import CacheSteps, PageSteps

        self.device = device
        self.text = json.loads((folder / "model.json").read_text("utf-8"))
        self.variant = Variant(**self.text["variant"])
        library = LibraryFile(folder / "model.so", device)
        entries = library.metadata["params"]
        random = _torch_values if _torch() else _numpy_values
        values = [random(e, *self.text["fills"][e["name"]], device) for e in entries]
        self.weight_bytes = sum(
            int(np.prod(e["shape"])) * np.dtype(e["dtype"]).itemsize
            for e in entries
            if "embed" not in e["name"]
        )
        functions = Functions(library)
        kind = PageSteps if self.variant.pages else CacheSteps
        self.call, self.to_host = functions.call, Downloads(device).get
        self.steps = kind(functions, tvm.runtime.convert(values), (MAX_BATCH, 2 * CONTEXT, CHUNK))
        self.cache = KVCache(
            self.steps.pages, context=CONTEXT, capacity=2 * CONTEXT, max_sequences=MAX_BATCH
        )

    def prefill(self, sequence: int, tokens: np.ndarray) -> Any:
        """Return the logits after ``tokens``, on the device."""
        with self.cache.forward([sequence], [len(tokens)]):
            name, arguments = self.steps.prefill(tokens.astype(np.int32), None)
            return self.call(name, *arguments)[0]

    def decode(self, sequences: list[int], tokens: np.ndarray) -> Any:
        """Return the logits of one step, on the device."""
        with self.cache.forward(sequences, [1] * len(sequences)):
            name, arguments = self.steps.decode(tokens.astype(np.int32))
            return self.call(name, *arguments)[0]


class Functions:
    """What steps need of a library, of which this benchmark's has a part."""

    def __init__(self, library: Any) -> None:
        self._library, self._found = library, {}
        self.device, self.to_device = library.device, library.to_device

    def has(self, name: str) -> bool:
        """Tell whether the library has a function that may be missing: it has none of them."""
        return False

    def call(self, name: str, *arguments: Any, tokens: int = 0) -> Any:
        """Call a function."""
        if name not in self._found:
            self._found[name] = self._library.find(name)
        return self._found[name](*arguments)


def _torch() -> Any:
    """Return torch where it sees a GPU, else None."""
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def _torch_values(entry: dict[str, Any], kind: str, value: float, device: Any) -> Any:
    import torch
    import tvm

    shape = tuple(entry["shape"])
    if kind == "bits":
        count = int(np.prod(shape)) * np.dtype(entry["dtype"]).itemsize
        filled = torch.randint(0, 256, (count,), dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        return tvm.runtime.from_dlpack(filled)._create_view(shape, entry["dtype"])
    dtype = getattr(torch, entry["dtype"])
    if kind == "constant":
        filled = torch.full(shape, value, dtype=dtype, device="cuda")
    else:
        filled = torch.randn(shape, dtype=dtype, device="cuda") * value
    torch.cuda.synchronize()
    return tvm.runtime.from_dlpack(filled)


def _numpy_values(entry: dict[str, Any], kind: str, value: float, device: Any) -> Any:
    import tvm

    rng, shape, dtype = np.random.default_rng(), tuple(entry["shape"]), np.dtype(entry["dtype"])
    if kind == "bits":
        words = rng.bytes(int(np.prod(shape)) * dtype.itemsize)
        filled = np.frombuffer(words, dtype).reshape(shape)
    elif kind == "constant":
        filled = np.full(shape, value, dtype)
    else:
        filled = (rng.standard_normal(shape, np.float32) * value).astype(dtype)
    return tvm.runtime.tensor(filled, device)


def check(runner: Runner, count: int = 24) -> float:
    """Compare logits after a prefill with those of decode, of one and of two sequences.

    Returns the largest relative difference, which `Variant.error` bounds.
    """
    vocab = runner.text["vocab"]
    tokens = np.random.default_rng(1).integers(0, vocab, count)
    whole, single = runner.cache.add(), runner.cache.add()
    want = runner.to_host(runner.prefill(whole, tokens)).astype(np.float64)
    for token in tokens:
        logits = runner.decode([single], np.array([token]))
    results = [runner.to_host(logits).reshape(vocab)]
    pair = [runner.cache.add(), runner.cache.add()]
    for sequence in pair:
        runner.prefill(sequence, tokens[:-1])
    logits = runner.to_host(runner.decode(pair, tokens[-1:].repeat(2)))
    results += list(logits.reshape(2, vocab))
    for sequence in (whole, single, *pair):
        runner.cache.remove(sequence)
    want = want.reshape(vocab)
    return max(float(np.linalg.norm(got - want) / np.linalg.norm(want)) for got in results)


def timed(runner: Runner, run: Callable[[], Any], repeat: int) -> list[float]:
    """Return the seconds of each of some runs, the first of which does not count."""
    seconds = []
    for _ in range(repeat + 1):
        runner.device.sync()
        start = time.perf_counter()
        run()
        runner.device.sync()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def profile(run: Callable[[], Any], steps: int = 4) -> list[list[Any]] | None:
    """Return [kernel, launches a step, microseconds of one] of some steps, longest in all first.

    What torch's profiler sees are all kernels of this process. The last row is the time from the
    first kernel to the end of the last, a step. None where torch has no GPU.
    """
    if not (torch := _torch()):
        return None
    activity = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activity) as recorded:
        for _ in range(steps):
            run()
        torch.cuda.synchronize()
    events = [e for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    found: dict[str, list[float]] = {}
    for event in events:
        found.setdefault(event.name, []).append(event.time_range.elapsed_us())
    rows: list[list[Any]] = [
        [name, len(times) / steps, round(float(np.mean(times)), 2)] for name, times in found.items()
    ]
    rows.sort(key=lambda row: -row[1] * row[2])
    if events:
        span = max(e.time_range.end for e in events) - min(e.time_range.start for e in events)
        rows.append(["from first to last", 1, round(span / steps, 2)])
    return rows


def measure_decode(
    runner: Runner, batch: int, context: int, steps: int = 64, profiled: bool = True
) -> dict[str, Any]:
    """Time decode steps of ``batch`` sequences of ``context`` tokens."""
    ids = [runner.cache.add() for _ in range(batch)]
    for sequence in ids:
        runner.prefill(sequence, np.arange(context) % runner.text["vocab"])
    tokens = np.zeros(batch, np.int32)
    queue_seconds: list[float] = []

    def generate() -> None:
        nonlocal tokens
        for _ in range(steps):
            logits = runner.to_host(runner.decode(ids, tokens)).reshape(batch, -1)
            tokens = logits.argmax(axis=1).astype(np.int32)
        forget()

    def forget() -> None:
        for sequence in ids:
            runner.cache.popn(sequence, steps)

    def queue() -> None:
        start = time.perf_counter()
        for _ in range(steps):
            runner.decode(ids, tokens)
        forget()
        queue_seconds.append(time.perf_counter() - start)

    generated, queued = timed(runner, generate, 3), timed(runner, queue, 3)
    kernels = profile(lambda: runner.decode(ids, tokens)) if profiled else None
    for sequence in ids:
        runner.cache.remove(sequence)
    step = float(np.median(queued)) / steps
    return {
        "what": "decode",
        "batch": batch,
        "context": context,
        "tokens_per_s": [batch * steps / s for s in generated],
        "step_ms": [1e3 * s / steps for s in queued],
        "cpu_step_ms": 1e3 * float(np.median(queue_seconds[1:])) / steps,
        "weight_gb_per_s": runner.weight_bytes / step / 1e9,
        **({"kernels": kernels} if kernels else {}),
    }


def measure_prefill(runner: Runner, length: int) -> dict[str, Any]:
    """Time the prefill of one sequence."""
    tokens = np.arange(length) % runner.text["vocab"]

    def run() -> None:
        sequence = runner.cache.add()
        runner.prefill(sequence, tokens)
        runner.device.sync()
        runner.cache.remove(sequence)

    seconds = timed(runner, run, 5)
    return {"what": "prefill", "length": length, "tokens_per_s": [length / s for s in seconds]}


MEASUREMENTS = (
    (measure_decode, 1, 128),
    (measure_decode, 1, 2048),
    (measure_prefill, 512),
    (measure_prefill, 2048),
    (measure_decode, 8, 128),
)


def run(arguments: argparse.Namespace) -> None:
    """Check and time every library; writes results as they come."""
    from fairy_compile.errors import UnsupportedError
    from fairy_compile.runtime.library import open_device

    end = time.perf_counter() + arguments.seconds
    try:
        device = open_device("cuda")
    except UnsupportedError:
        sys.exit("no CUDA device; run this on a machine with an NVIDIA GPU and driver")
    wrong: list[str] = []
    results: dict[str, Any] = {"device": str(device.device_name), "models": {}}
    for name in arguments.variant or VARIANTS:
        folder = arguments.models / name
        if not (folder / "model.so").exists():
            continue
        if time.perf_counter() > end:
            print(f"{name}: left out, {arguments.seconds:.0f} s are over", flush=True)
            continue
        start = time.perf_counter()
        runner = Runner(folder, device)
        error = check(runner)
        model: dict[str, Any] = {"error": error, "weight_gb": runner.weight_bytes / 1e9}
        model["rows"] = rows = []
        results["models"][name] = model
        seconds = time.perf_counter() - start
        print(
            f"{name}: prefill and decode differ by {error:.1e}; {seconds:.1f} s to load and check"
        )
        if not error <= runner.variant.error:
            wrong.append(name)
            print(f"  wrong: at most {runner.variant.error:.1e} is rounding", flush=True)
        for measure, *sizes in MEASUREMENTS if name not in wrong else ():
            if time.perf_counter() > end:
                break
            rows.append(measure(runner, *sizes))
            print(f"  {_line(rows[-1])}", flush=True)
            if arguments.output:
                arguments.output.write_text(json.dumps(results, indent=1), "utf-8")
        del runner
        gc.collect()
        if torch := _torch():
            torch.cuda.empty_cache()
    if wrong:
        sys.exit(f"prefill and decode disagree, so nothing was timed: {', '.join(wrong)}")


def _line(row: dict[str, Any]) -> str:
    rates = sorted(row["tokens_per_s"])
    rate = f"{np.median(rates):.1f} tokens/s ({rates[0]:.1f}-{rates[-1]:.1f})"
    if row["what"] == "prefill":
        return f"prefill of {row['length']}: {rate}"
    steps = sorted(row["step_ms"])
    kernels = "".join(
        f"\n    {count:6.1f} x {us:8.2f} us  {name[:90]}"
        for name, count, us in row.get("kernels", ())
    )
    return (
        f"decode, batch {row['batch']}, context {row['context']}: {rate}; a queued step "
        f"{np.median(steps):.3f} ms ({steps[0]:.3f}-{steps[-1]:.3f}), of the CPU "
        f"{row['cpu_step_ms']:.3f} ms; {row['weight_gb_per_s']:.0f} GB/s of weights"
        f"{kernels}"
    )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(required=True)
    builder = verbs.add_parser("build")
    builder.add_argument("-o", "--output", type=Path, required=True)
    builder.add_argument("--shape", choices=list(SHAPES), default="7b")
    builder.add_argument("--target", default="cuda", help="or cuda-hopper")
    builder.add_argument("--arch", action="append", help="default: those of the target file")
    builder.set_defaults(verb=build)
    runner = verbs.add_parser("run")
    runner.add_argument("models", type=Path)
    runner.add_argument("-o", "--output", type=Path)
    runner.add_argument("--seconds", type=float, default=90)
    runner.set_defaults(verb=run)
    for verb in (builder, runner):
        verb.add_argument("--variant", action="append", choices=list(VARIANTS))
    arguments = parser.parse_args()
    arguments.verb(arguments)


if __name__ == "__main__":
    main()
