"""Whole models on a CUDA GPU: phase weights beside 4-bit groups and float16, one compiler.

Two steps, so that the GPU machine needs no compiler and no weights are carried:

    python benchmarks/gpu_model.py build -o gpu-models                  # any machine with nvcc
    python benchmarks/gpu_model.py run gpu-models -o gpu-model.json     # the GPU machine

`build` compiles libraries of one shape that differ in their linear layers, see `VARIANTS`. `run`
fills their parameters with random numbers on the device. For each it first compares a prefill with
the same tokens fed one by one, which takes other kernels, and stops if they disagree. Then it times
decode as an engine does it (logits come to the host, which picks the next token), decode steps that
are only queued (their time is that of the slower of GPU and CPU), and prefill.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

SHAPES = {
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 512,
    },
}
CONTEXT, CHUNK, MAX_BATCH = 4096, 2048, 8
ENTRY_POINTS = ["_metadata", "embed", "prefill", "decode", "batch_decode"]
ENTRY_POINTS += ["create_tir_paged_kv_cache", "alloc_embedding_tensor"]


@dataclass(frozen=True)
class Variant:
    """One library.

    Attributes:
        weights: ``phase``, or the name of a peer's layout.
        stages: T of phase weights.
        act: their activation contract.
        graphs: decode steps are CUDA graphs.
        error: most relative difference of logits by prefill and by decode.
    """

    weights: str
    stages: int = 0
    act: str = "float"
    graphs: bool = True
    error: float = 3e-2


# Rounding to float16 (2^-11 / sqrt(3) on average) some ten times a layer gives 0.5 % after 32; six
# times as much is allowed. int8 activations add up to 2.6 % a call, see README.md under Accuracy.
_INT8_ERROR = 0.026 * 129**0.5
# In the order in which they are run.
VARIANTS = {
    "w2-int16": Variant("phase", 2, "int16"),
    "four-bit": Variant("four_bit"),
    "w2-int16-nographs": Variant("phase", 2, "int16", graphs=False),
    "four-bit-nographs": Variant("four_bit", graphs=False),
    "w1-int16": Variant("phase", 1, "int16"),
    "w2-int8": Variant("phase", 2, "int8", error=_INT8_ERROR),
    "dense": Variant("dense"),
    "w1-int8": Variant("phase", 1, "int8", error=_INT8_ERROR),
}


class ShapePlanner:
    """Plans every linear layer of a model alike; see `LinearPlanner`."""

    def __init__(self, variant: Variant, target: Any) -> None:
        self.variant, self.target = variant, target
        self.calls: list[Any] = []

    def dtype(self, name: str) -> str:
        return "float16"

    source_dtype = dtype

    def linear(
        self, name: str, sources: Any, in_features: int, out_features: Any, bias: bool = False,
        token_int8: bool = False, out_dtype: str = "float16",
    ) -> list[Any]:  # fmt: skip
        from gpu_peers import DENSE, FOUR_BIT

        from fairy_compile.kernels.cuda import CudaPlanes
        from fairy_compile.models.linear import LinearCall
        from fairy_compile.op import PhaseSpec

        kernels = {"phase": CudaPlanes(), "dense": DENSE, "four_bit": FOUR_BIT}
        spec = PhaseSpec(
            tuple(n // 2 for n in out_features), in_features // 2, max(1, self.variant.stages),
            ("U", "W"), "tensor", self.variant.act, "float16", out_dtype,
        )  # fmt: skip
        call = LinearCall(
            name, tuple(sources), in_features, tuple(out_features), bias, "", spec,
            kernels[self.variant.weights], act_dtype="float16", out_dtype=out_dtype,
        )  # fmt: skip
        self.calls.append(call)
        return [call]

    def head(self, name: str, in_features: int, vocab: int) -> list[Any]:
        return self.linear(name, [name], in_features, [vocab], out_dtype="float32")


def build(arguments: argparse.Namespace) -> None:
    """Compile the libraries, each into a folder with what to fill its parameters with."""
    from dataclasses import replace

    from fairy_compile.targets import load_target

    target = load_target("cuda")
    if arguments.arch:
        target = replace(target, extra={**target.extra, "archs": arguments.arch})
    for name in arguments.variant or VARIANTS:
        start = time.perf_counter()
        build_one(arguments.output / name, VARIANTS[name], SHAPES[arguments.shape], target)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


def build_one(folder: Path, variant: Variant, shape: dict[str, int], target: Any) -> None:
    """Compile one library."""
    from dataclasses import replace

    from fairy_compile.compiler.library import Sizes, define
    from fairy_compile.compiler.pipeline import compile_module
    from fairy_compile.models import parse_config

    config = parse_config({"model_type": "llama", "rms_norm_eps": 1e-5, **shape})
    config = replace(config, kv_dtype="float16", act_dtype="float16", context=CONTEXT)
    planner = ShapePlanner(variant, target)
    sizes = Sizes(CONTEXT, CHUNK, MAX_BATCH)
    module, params, _ = define(config, planner, target, sizes, variant.weights)
    graphs = MAX_BATCH if variant.graphs else None
    executable = compile_module(module, target, ENTRY_POINTS, cuda_graphs=graphs)
    folder.mkdir(parents=True, exist_ok=True)
    executable.export_library(str(folder / "model.so"))
    fills = {p.name: _fill(p, variant) for p in params}
    text = {"variant": asdict(variant), "vocab": shape["vocab_size"], "fills": fills}
    (folder / "model.json").write_text(json.dumps(text, indent=1), "utf-8")


def _fill(param: Any, variant: Variant) -> tuple[str, float]:
    """Return what a parameter is filled with so that outputs of a layer vary by about 1."""
    if param.call is None:
        return ("normal", 1.0) if "embed" in param.name else ("constant", 1.0)
    size = param.call.in_features
    if param.array == "scales":  # of two terms, each a sum over half as many complex columns
        return "constant", (size * variant.stages) ** -0.5
    if param.array == "scale":  # codes 0 .. 15 less 7 have a mean square of 21.5
        return "constant", (21.5 * size) ** -0.5
    if variant.weights == "dense":
        return "normal", size**-0.5
    return "bits", 0.0


class Runner:
    """A library with random parameters, called as `fairy_compile.runtime.engine` calls one."""

    def __init__(self, folder: Path, device: Any) -> None:
        import tvm

        from fairy_compile.runtime.kv_cache import PAGE_SIZE, KVCache
        from fairy_compile.runtime.library import LibraryFile

        self.device, self.tvm = device, tvm
        self.text = json.loads((folder / "model.json").read_text("utf-8"))
        self.variant = Variant(**self.text["variant"])
        library = LibraryFile(folder / "model.so", device)
        names = ("embed", "prefill", "decode", "batch_decode", "create_tir_paged_kv_cache")
        self.call = {name: library.find(name) for name in names}
        entries = library.metadata["params"]
        random = _torch_values if _torch() else _numpy_values
        values = [random(e, *self.text["fills"][e["name"]], device) for e in entries]
        self.params = tvm.runtime.convert(values)
        self.weight_bytes = sum(
            int(np.prod(e["shape"])) * np.dtype(e["dtype"]).itemsize
            for e in entries
            if "embed" not in e["name"]
        )
        sizes = (MAX_BATCH, 2 * CONTEXT, CHUNK, PAGE_SIZE, 0)
        handle = self.call["create_tir_paged_kv_cache"](
            *(tvm.runtime.ShapeTuple([size]) for size in sizes)
        )
        self.cache = KVCache(handle, context=CONTEXT, capacity=2 * CONTEXT, max_sequences=MAX_BATCH)

    def _embed(self, tokens: Any, batch: int) -> Any:
        ids = self.tvm.runtime.tensor(np.asarray(tokens, np.int32), self.device)
        x = self.call["embed"](ids, self.params)
        return x._create_view((batch, len(tokens) // batch, int(x.shape[-1])))

    def prefill(self, sequence: int, tokens: Any) -> Any:
        """Return the logits after ``tokens``, on the device."""
        x = self._embed(tokens, 1)
        with self.cache.forward([sequence], [len(tokens)]):
            return self.call["prefill"](x, self.cache.handle, self.params)[0]

    def decode(self, sequences: list[int], tokens: Any) -> Any:
        """Return the logits of one step, on the device."""
        x = self._embed(tokens, len(sequences))
        name = "decode" if len(sequences) == 1 else "batch_decode"
        with self.cache.forward(sequences, [1] * len(sequences)):
            return self.call[name](x, self.cache.handle, self.params)[0]


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
    """Compare logits after a prefill with those token by token; return the relative difference.

    Raises:
        SystemExit: they differ by more than rounding.
    """
    vocab = runner.text["vocab"]
    tokens = np.random.default_rng(1).integers(0, vocab, count)
    whole, single = runner.cache.add(), runner.cache.add()
    want = runner.prefill(whole, tokens).numpy().astype(np.float64)
    for token in tokens:
        logits = runner.decode([single], [token])
    got = logits.numpy().astype(np.float64)
    runner.cache.remove(whole)
    runner.cache.remove(single)
    error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    if not error <= runner.variant.error:
        sys.exit(
            f"prefill and decode of {runner.variant} differ by {error:.2e}; at most "
            f"{runner.variant.error:.1e} is rounding"
        )
    return error


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


def measure_decode(runner: Runner, batch: int, context: int, steps: int = 64) -> dict[str, Any]:
    """Time decode steps of ``batch`` sequences of ``context`` tokens."""
    ids = [runner.cache.add() for _ in range(batch)]
    for sequence in ids:
        runner.prefill(sequence, np.arange(context) % runner.text["vocab"])
    tokens = np.zeros(batch, np.int32)
    queue_seconds: list[float] = []

    def generate() -> None:
        nonlocal tokens
        for _ in range(steps):
            logits = runner.decode(ids, tokens).numpy().reshape(batch, -1)
            tokens = logits.argmax(axis=1).astype(np.int32)

    def queue() -> None:
        start = time.perf_counter()
        for _ in range(steps):
            runner.decode(ids, tokens)
        queue_seconds.append(time.perf_counter() - start)

    generated, queued = timed(runner, generate, 3), timed(runner, queue, 3)
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
        for measure, *sizes in MEASUREMENTS:
            if time.perf_counter() > end:
                break
            rows.append(measure(runner, *sizes))
            print(f"  {_line(rows[-1])}", flush=True)
            if arguments.output:
                arguments.output.write_text(json.dumps(results, indent=1), "utf-8")
        del runner
        gc.collect()


def _line(row: dict[str, Any]) -> str:
    rates = sorted(row["tokens_per_s"])
    rate = f"{np.median(rates):.1f} tokens/s ({rates[0]:.1f}-{rates[-1]:.1f})"
    if row["what"] == "prefill":
        return f"prefill of {row['length']}: {rate}"
    steps = sorted(row["step_ms"])
    return (
        f"decode, batch {row['batch']}, context {row['context']}: {rate}; a queued step "
        f"{np.median(steps):.3f} ms ({steps[0]:.3f}-{steps[-1]:.3f}), of the CPU "
        f"{row['cpu_step_ms']:.3f} ms; {row['weight_gb_per_s']:.0f} GB/s of weights"
    )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(required=True)
    builder = verbs.add_parser("build")
    builder.add_argument("-o", "--output", type=Path, required=True)
    builder.add_argument("--shape", choices=list(SHAPES), default="7b")
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
