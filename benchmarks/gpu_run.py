"""The half of `gpu.py` that runs on a GPU machine: torch, tvm_ffi and TVM's runtime libraries.

Nothing here needs TVM's compiler or its Python package; arrays are torch's, passed as DLPack.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm_ffi

from fairy_compile.kernels.cuda_image import make_image
from fairy_compile.kernels.cuda_layout import CudaLayout
from fairy_compile.op import PhaseSpec, phase_gemm_reference

LAYOUT = CudaLayout()
L2_BYTES = 60 << 20  # of an H200, the largest we know of
_POOL_BYTES = 768 << 20  # of weights that launches take in turn
# Decode is exact for quantised activations: float16 outputs, then float32 sums. Prefill and the
# peers: float16 weights and activations, float32 sums.
ERRORS = {"phase decode": 1e-3, "phase prefill": 2e-3}
_CHECKED_TILES, _CHECKED_ROWS = 4, 64


def load_library(path: Path) -> Any:
    """Load a library of kernels with TVM's runtime alone.

    Raises:
        SystemExit: a part of the runtime is missing.
    """
    if not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device; run this on a machine with an NVIDIA GPU and driver")
    torch.zeros(1, device="cuda")  # loads libcudart
    for name in ("libtvm_runtime.so", "libtvm_runtime_cuda.so"):
        _load(name)
    return tvm_ffi.load_module(str(path))


def _load(name: str) -> None:
    folders = [Path(p) for p in os.environ.get("TVM_LIBRARY_PATH", "").split(os.pathsep) if p]
    spec = importlib.util.find_spec("tvm")
    if spec and spec.origin:
        folders.append(Path(spec.origin).parent / "lib")
    for folder in folders:
        if (folder / name).exists():
            ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL)
            return
    sys.exit(
        f"{name} of the apache-tvm wheel was not found; install the wheel, or set TVM_LIBRARY_PATH "
        "to the folder that holds it"
    )


def graph_times(launch: Callable[[int], None], launches: int, replays: int = 15) -> list[float]:
    """Return microseconds of a launch in each of some replays of one CUDA graph of ``launches``."""
    stream = torch.cuda.Stream()
    with tvm_ffi.use_torch_stream(torch.cuda.stream(stream)):
        launch(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with tvm_ffi.use_torch_stream(torch.cuda.graph(graph, stream=stream)):
        for i in range(launches):
            launch(i)
    times = []
    with torch.cuda.stream(stream):
        for _ in range(replays + 2):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / launches)
    return times[2:]


def summary(times: list[float]) -> dict[str, float]:
    """Return the median and the spread between the quartiles."""
    low, median, high = np.percentile(times, (25, 50, 75))
    return {"us": float(median), "low_us": float(low), "high_us": float(high)}


def copy_bandwidth(nbytes: int = 2 << 30) -> float:
    """Return the bytes a second that a kernel that copies reads and writes.

    The copies of a CUDA graph are done by copy engines, which are slower than kernels.
    """
    source = torch.randn(nbytes // 4, device="cuda")
    target = torch.empty_like(source)
    times = graph_times(lambda _: torch.mul(source, 1.0, out=target), 2)
    return 2 * nbytes / np.median(times) * 1e6


class Weights:
    """Random bytes that weights are cut from, so that launches in turn find none in the cache."""

    def __init__(self) -> None:
        self.bytes = torch.randint(0, 256, (_POOL_BYTES,), dtype=torch.uint8, device="cuda")
        self.halves = torch.randn(_POOL_BYTES, dtype=torch.float16, device="cuda") * 0.02

    def codes(self, shape: tuple[int, ...]) -> list[torch.Tensor]:
        """Return uint8 arrays of a shape, as many as fit."""
        return _cut(self.bytes, shape)

    def floats(self, shape: tuple[int, ...]) -> list[torch.Tensor]:
        """Return float16 arrays of a shape, as many as fit."""
        return _cut(self.halves, shape)


def _cut(pool: torch.Tensor, shape: tuple[int, ...], most: int = 48) -> list[torch.Tensor]:
    size = int(np.prod(shape))
    step = -(-size // 128) * 128
    count = max(1, min(most, pool.numel() // step))
    return [pool[i * step : i * step + size].view(shape) for i in range(count)]


def measure_phase(
    function: Any,
    spec: PhaseSpec,
    batch: int,
    decodes: bool,
    weights: Weights,
    *,
    image: bool = False,
) -> dict[str, Any]:
    """Check one phase call for a number of rows, then time it.

    With ``image`` the call takes x as `kernels.cuda_image` makes it.

    Raises:
        SystemExit: the kernel is wrong.
    """
    rng = np.random.default_rng()
    shapes = LAYOUT.arrays(spec)
    codes = weights.codes(shapes["codes"].shape)
    some = rng.uniform(0.005, 0.02, shapes["scales"].shape[2:])
    host_scales = np.broadcast_to(some, shapes["scales"].shape).astype(np.float32)
    scales = torch.from_numpy(host_scales.copy()).cuda()
    x = torch.randn(batch, spec.in_features, dtype=torch.float16, device="cuda")
    y = torch.full((batch, spec.out_features), torch.nan, dtype=torch.float16, device="cuda")
    given = x
    if image:
        given = torch.from_numpy(make_image(x.cpu().numpy(), spec.act)).cuda()
    function(given, codes[-1], scales, y)
    tiles = {
        "codes": codes[-1][:_CHECKED_TILES].cpu().numpy(),
        "scales": host_scales[:_CHECKED_TILES],
    }
    error = _check(spec, tiles, x, y, decodes)
    times = graph_times(
        lambda i: function(given, codes[i % len(codes)], scales, y), 48 if batch < 64 else 6
    )
    nbytes = codes[0].numel() + scales.numel() * 4
    return {"error": error, "bytes": nbytes, "fits_l2": nbytes * len(codes) < L2_BYTES} | summary(
        times
    )


def _check(
    spec: PhaseSpec, tiles: dict[str, np.ndarray], x: torch.Tensor, y: torch.Tensor, decodes: bool
) -> float:
    """Compare some rows with the reference and look for values that were not written."""
    part = replace(spec, parts=(min(spec.n, 16 * _CHECKED_TILES),))
    rows = sorted({*range(min(len(x), _CHECKED_ROWS)), *range(max(0, len(x) - 3), len(x))})
    act = spec.act if decodes else "float"
    given = x[rows].float().cpu().numpy()
    want = phase_gemm_reference(given, LAYOUT.unpack(tiles, part), act)
    host = y[rows].float().cpu().numpy()
    got = np.concatenate([host[:, : part.n], host[:, spec.n : spec.n + part.n]], axis=1)
    error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    allowed = ERRORS["phase decode" if decodes else "phase prefill"]
    if not error <= allowed or bool(torch.isnan(y).any()):
        sys.exit(
            f"{spec.describe()} is wrong for {len(x)} rows: relative error {error:.2e}, allowed "
            f"{allowed}; {int(torch.isnan(y).sum())} outputs are no numbers"
        )
    return error


def measure_dense(
    function: Any, shape: tuple[int, int], batch: int, weights: Weights
) -> dict[str, Any]:
    """Check and time y = x W^T in float16; ``function`` takes (x, W, y)."""
    matrices = weights.floats(shape)
    x = torch.randn(batch, shape[1], dtype=torch.float16, device="cuda")
    y = torch.full((batch, shape[0]), torch.nan, dtype=torch.float16, device="cuda")
    function(x, matrices[-1], y)
    want = x.float() @ matrices[-1].float().t()
    error = float(torch.linalg.norm(y.float() - want) / torch.linalg.norm(want))
    if not error <= ERRORS["phase prefill"]:
        sys.exit(f"a dense call is wrong for {batch} rows: relative error {error:.2e}")
    times = graph_times(
        lambda i: function(x, matrices[i % len(matrices)], y), 24 if batch < 64 else 4
    )
    return {"error": error, "bytes": matrices[0].numel() * 2} | summary(times)


def torch_matmul(x: torch.Tensor, matrix: torch.Tensor, y: torch.Tensor) -> None:
    """Multiply with cuBLAS."""
    torch.matmul(x, matrix.t(), out=y)


def until(seconds: float | None) -> Callable[[], bool]:
    """Return a function that tells whether a time is over."""
    end = np.inf if seconds is None else time.monotonic() + seconds
    return lambda: time.monotonic() > end


def within(values: list[Any], over: Callable[[], bool]) -> Iterator[Any]:
    """Yield values while there is time."""
    for value in values:
        if over():
            return
        yield value
