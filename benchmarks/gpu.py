"""Phase kernels on a CUDA GPU: numbers first, then times beside float16 and the copy bandwidth.

Two steps, so that the GPU machine needs no compiler:

    python benchmarks/gpu.py build -o gpu-kernels             # any machine with nvcc
    python benchmarks/gpu.py run gpu-kernels -o results.json  # the GPU machine

`run` stops if a kernel is wrong: it compares rows of every call with the float64 reference on fresh
random data. Then it times the phase kernel, the dense float16 kernel of the same compiler, and
torch's float16 matmul where torch sees the GPU. A time is the mean of launches one after the other.
Weights that fit the L2 cache are read from it, which the table marks; their rate is no share of the
memory bandwidth.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from fairy_compile.kernels.cuda import CudaPlanes
from fairy_compile.op import PhaseSpec, phase_gemm_reference
from fairy_compile.targets import load_target

SHAPES = {  # (output, input) features
    "7b-o": (4096, 4096),
    "7b-gate-up": (22016, 4096),
    "7b-down": (4096, 11008),
    "13b-gate-up": (27648, 5120),
    "70b-o": (8192, 8192),
    "70b-gate-up": (57344, 8192),
    "70b-down": (8192, 28672),
}
KERNEL = CudaPlanes()
BATCHES = (1, 2, 8, 64, 512, 2048)
_L2_BYTES = 50 << 20  # of an H100 or H200, the largest we know of
# Decode is exact for quantised activations: float16 outputs, then float32 sums. Prefill: float16
# weights and activations.
_DECODE_ERROR, _PREFILL_ERROR = 1e-3, 2e-3
_CHECKED_TILES = 4


def make_spec(shape: tuple[int, int], stages: int, act: str) -> PhaseSpec:
    """Return the call of a layer with tensor scales."""
    features, size = shape
    both = ("U", "W")
    return PhaseSpec((features // 2,), size // 2, stages, both, "tensor", act, "float16", "float16")


def build(arguments: argparse.Namespace) -> None:
    """Compile the library and write what is in it."""
    from fairy_compile.compiler.cuda_binary import machine_code
    from fairy_compile.kernels.dense_gpu import build_dense
    from fairy_compile.models.linear import LinearCall

    target = load_target("cuda")
    if arguments.arch:
        target = replace(target, extra={**target.extra, "archs": arguments.arch})
    functions, calls = {}, []
    for name in arguments.shape or SHAPES:
        features, size = SHAPES[name]
        dense = LinearCall(
            name, (name,), size, (features,), False, "", dtype="float16", act_dtype="float16",
            out_dtype="float16",
        )  # fmt: skip
        for batch in ("single", "many"):
            functions[_symbol("dense", name, batch)] = build_dense(dense, target.limits, batch)
        for stages in arguments.stages:
            spec = make_spec((features, size), stages, arguments.act)
            calls.append({"shape": name, "spec": asdict(spec)})
            for batch in ("single", "many"):
                symbol = _symbol(f"phase{stages}", name, batch)
                functions[symbol] = KERNEL.build(spec, target, batch, {})
    module = tvm.IRModule({s: f.with_attr("global_symbol", s) for s, f in functions.items()})
    with machine_code(target):
        library = tvm.compile(module, target=target.to_tvm())
    arguments.output.mkdir(parents=True, exist_ok=True)
    library.export_library(str(arguments.output / "kernels.so"))
    (arguments.output / "calls.json").write_text(json.dumps(calls, indent=1), "utf-8")


def _symbol(kind: str, shape: str, batch: str) -> str:
    return f"{kind}_{shape.replace('-', '_')}_{batch}"


def run(arguments: argparse.Namespace) -> None:
    """Check and time every call of a library."""
    device = tvm.cuda()
    if not device.exist:
        sys.exit("no CUDA device; run this on a machine with an NVIDIA GPU and driver")
    library = tvm.runtime.load_module(str(arguments.library / "kernels.so"))
    calls = json.loads((arguments.library / "calls.json").read_text("utf-8"))
    bandwidth = copy_bandwidth(device)
    results: dict[str, Any] = {
        "device": str(device.device_name),
        "copy_gb_per_s": bandwidth / 1e9,
        "rows": [],
    }
    print(f"{device.device_name}: copies {bandwidth / 1e9:.0f} GB/s\n")
    print("| call | T | rows of x | error | phase us | GB/s | of copy | dense us | torch us |")
    print("|---|---|---|---|---|---|---|---|---|")
    for call in calls:
        spec = _read_spec(call["spec"])
        for row in measure(library, device, call["shape"], spec, arguments.batch, bandwidth):
            results["rows"].append(row)
            print(_table_row(row), flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1), "utf-8")


def _read_spec(fields: dict[str, Any]) -> PhaseSpec:
    return PhaseSpec(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def measure(
    library: Any, device: Any, shape: str, spec: PhaseSpec, batches: list[int], bandwidth: float
) -> list[dict[str, Any]]:
    """Check one call for every number of rows, then time it."""
    rng = np.random.default_rng()
    shapes = KERNEL.layout.arrays(spec)
    codes = rng.integers(0, 256, shapes["codes"].shape, dtype=np.uint8)
    scales = np.broadcast_to(
        rng.uniform(0.005, 0.02, shapes["scales"].shape[2:]), shapes["scales"].shape
    ).astype(np.float32)
    packed = [tvm.runtime.tensor(a, device) for a in (codes, scales)]
    weight = rng.standard_normal((spec.out_features, spec.in_features), np.float32)
    weight = weight.astype(np.float16)
    dense = tvm.runtime.tensor(weight, device)
    rows = []
    for batch in batches:
        x = rng.standard_normal((batch, spec.in_features)).astype(np.float16)
        given = tvm.runtime.tensor(x, device)
        y = tvm.runtime.empty((batch, spec.out_features), "float16", device)
        kind = "single" if batch == 1 else "many"
        symbol = _symbol(f"phase{spec.stages}", shape, kind)
        library[symbol](given, *packed, y)
        error = check(spec, codes, scales, x, y.numpy(), symbol)
        seconds = _seconds(library, symbol, device, given, *packed, y)
        nbytes = codes.nbytes + scales.nbytes
        dense_symbol = _symbol("dense", shape, kind)
        rows.append(
            {
                "call": shape,
                "stages": spec.stages,
                "batch": batch,
                "error": error,
                "phase_us": seconds * 1e6,
                "gb_per_s": nbytes / seconds / 1e9,
                "of_copy": nbytes / seconds / bandwidth,
                "fits_l2": nbytes <= _L2_BYTES,
                "dense_us": _seconds(library, dense_symbol, device, given, dense, y) * 1e6,
                "torch_us": _torch_us(weight, x),
            }
        )
    return rows


def check(
    spec: PhaseSpec,
    codes: np.ndarray,
    scales: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    symbol: str,
) -> float:
    """Compare the first row tiles with the reference; returns the relative error.

    Raises:
        SystemExit: the kernel is wrong.
    """
    part = replace(spec, parts=(min(spec.n, 16 * _CHECKED_TILES),))
    arrays = {"codes": codes[:_CHECKED_TILES], "scales": scales[:_CHECKED_TILES]}
    prefill = len(x) >= KERNEL.knobs["switch"][0]
    weights = KERNEL.layout.unpack(arrays, part)
    want = phase_gemm_reference(x.astype(np.float32), weights, "float" if prefill else spec.act)
    got = np.concatenate([y[:, : part.n], y[:, spec.n : spec.n + part.n]], axis=1)
    error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    if not error <= (_PREFILL_ERROR if prefill else _DECODE_ERROR):
        sys.exit(f"{symbol} is wrong for {len(x)} rows: relative error {error:.2e}")
    return error


def copy_bandwidth(device: Any, nbytes: int = 1 << 30) -> float:
    """Return the bytes a second that a copy on the device reads and writes."""
    import time

    source = tvm.runtime.empty((nbytes,), "uint8", device)
    target = tvm.runtime.empty((nbytes,), "uint8", device)
    best = np.inf
    for _ in range(5):
        device.sync()
        start = time.perf_counter()
        source.copyto(target)
        device.sync()
        best = min(best, time.perf_counter() - start)
    return 2 * nbytes / best


def _seconds(library: Any, symbol: str, device: Any, *arguments: Any) -> float:
    timer = library.time_evaluator(symbol, device, number=20, repeat=5)
    return float(np.median(timer(*arguments).results))


def _torch_us(weight: np.ndarray, x: np.ndarray) -> float | None:
    """Return torch's time of the float16 matmul, or None where torch sees no GPU."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    a, w = (torch.from_numpy(value).cuda() for value in (x, weight))
    for _ in range(3):
        a @ w.T
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(50):
        a @ w.T
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3 / 50


def _table_row(row: dict[str, Any]) -> str:
    torch_us = "-" if row["torch_us"] is None else f"{row['torch_us']:.1f}"
    share = "in L2" if row["fits_l2"] else f"{row['of_copy']:.0%}"
    return (
        f"| {row['call']} | {row['stages']} | {row['batch']} | {row['error']:.1e} |"
        f" {row['phase_us']:.1f} | {row['gb_per_s']:.0f} | {share} | {row['dense_us']:.1f} |"
        f" {torch_us} |"
    )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(required=True)
    builder = verbs.add_parser("build")
    builder.add_argument("-o", "--output", type=Path, required=True)
    builder.add_argument("--shape", action="append", choices=list(SHAPES))
    builder.add_argument("--stages", type=int, nargs="+", default=[2, 1])
    builder.add_argument("--act", choices=["int8", "int16"], default="int16")
    builder.add_argument("--arch", action="append", help="default: those of the target file")
    builder.set_defaults(verb=build)
    runner = verbs.add_parser("run")
    runner.add_argument("library", type=Path)
    runner.add_argument("-o", "--output", type=Path)
    runner.add_argument("--batch", type=int, nargs="+", default=list(BATCHES))
    runner.set_defaults(verb=run)
    arguments = parser.parse_args()
    arguments.verb(arguments)


if __name__ == "__main__":
    main()
