"""The build half of `vulkan_gpu`: kernels as SPIR-V, and the launches of every call."""

from __future__ import annotations

import argparse
import hashlib
import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import tvm
from tvm.tirx.script import builder as T

from benchmarks.vulkan_gpu import DECODE, PREFILL, SHAPES, Call
from fairy_compile.codegen import spirv
from fairy_compile.kernels.gpu_builder import build_function, launch, local, store, strided, when
from fairy_compile.kernels.vulkan import VULKAN_KERNELS
from fairy_compile.op import PhaseSpec
from fairy_compile.targets import Target, load_target
from tests.emulation import vulkan_runtime
from tests.emulation.vulkan_module import ShaderKernel

(KERNEL,) = VULKAN_KERNELS
ONE_ROW: list[dict[str, Any]] = [
    {},
    {"rows": 1},
    {"rows": 4},
    {"rows": 4, "group": 256},
    {"rows": 4, "ahead": True},
    {"rows": 2, "threads": 64},
    {"rows": 2, "threads": 128},
    {"rows": 4, "threads": 64},
    {"rows": 8, "threads": 64},
    {"weights": "bits"},
    {"weights": "bits", "rows": 4, "threads": 64},
    {"weights": "halves", "rows": 4, "group": 256},
    {"weights": "halves", "rows": 8, "group": 256},
    {"weights": "halves", "rows": 8, "group": 256, "ahead": True},
    {"weights": "halves", "rows": 4, "group": 128, "threads": 64},
    {"weights": "halves", "rows": 4, "group": 128, "threads": 128},
    {"weights": "halves", "rows": 8, "group": 128, "threads": 128},
    {"weights": "blocks", "rows": 4, "group": 256, "ahead": True},
    {"weights": "blocks", "rows": 8, "group": 256},
    {"weights": "blocks", "rows": 8, "group": 512},
    {"weights": "products", "threads": 32, "rows": 2, "group": 256},
    {"weights": "products", "threads": 32, "rows": 4, "group": 256},
    {"weights": "products", "threads": 64, "rows": 1, "group": 256},
    {"weights": "products", "threads": 64, "rows": 2, "group": 256},
    {"weights": "products", "threads": 64, "rows": 2, "group": 512},
    {"weights": "products", "threads": 128, "rows": 1, "group": 512},
    {"weights": "products", "threads": 128, "rows": 2, "group": 512},
]
"""Settings for one row of x."""
SOME_ROWS: list[dict[str, Any]] = [
    {},
    {"weights": "halves", "rows": 4, "group": 256, "tokens": 2},
    {"weights": "blocks", "rows": 4, "group": 256, "tokens": 2},
]
"""Settings for several."""
PREFILL_SETTINGS: list[dict[str, Any]] = [
    {},
    {"matrices": True},
    {"matrices": True, "tile_tokens": 32},
]


def make_spec(shape: tuple[int, int], stages: int) -> PhaseSpec:
    """Return the call of a layer with tensor scales."""
    features, size = shape
    both = ("U", "W")
    return PhaseSpec(
        (features // 2,), size // 2, stages, both, "tensor", "float", "float16", "float16"
    )


def build(arguments: argparse.Namespace) -> None:
    """Compile every call and write what is in the folder."""
    spirv.register()
    vulkan_runtime.install()
    target = load_target(arguments.target)
    target = replace(target, tvm=target.tvm | {"host": {"kind": "llvm", "opt-level": 0}})
    if arguments.simd_width:
        target = replace(target, limits=replace(target.limits, simd_width=arguments.simd_width))
    arguments.output.mkdir(parents=True, exist_ok=True)
    calls, shapes = [], {}
    with zipfile.ZipFile(
        arguments.output / "kernels.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9
    ) as archive:
        for name in arguments.shape or [s for s in SHAPES if s != "small"]:
            for stages in arguments.stages:
                spec = make_spec(SHAPES[name], stages)
                arrays = KERNEL.layout.arrays(spec)
                shapes[f"{name}-{stages}"] = {k: list(a.shape) for k, a in arrays.items()}
                calls += build_shape(name, spec, target, archive, arguments.only)
                print(f"{name} T={stages}: {len(calls)} calls", flush=True)
    (arguments.output / "calls.json").write_text(json.dumps([asdict(c) for c in calls]), "utf-8")
    (arguments.output / "shapes.json").write_text(json.dumps(shapes), "utf-8")


def build_shape(
    name: str, spec: PhaseSpec, target: Target, archive: zipfile.ZipFile, only: str | None
) -> list[Call]:
    """Return the calls of one shape: those of decode, of prefill, or all."""
    reason = KERNEL.unsupported(spec, target)
    if reason:
        raise SystemExit(f"{name}: {reason}")
    calls = []
    if only != "prefill":
        call = Call(name, asdict(spec), 1, {"read": True})
        library = compile_function(read_only(spec), target)
        call.launches = [describe(*launch, archive) for launch in trace(library, spec, 1, True)]
        calls.append(call)
    for kind, settings, batches in (
        ("single", ONE_ROW, (1,)),
        ("many", SOME_ROWS, DECODE[1:]),
        ("many", PREFILL_SETTINGS, PREFILL),
    ):
        if only == ("decode" if batches == PREFILL else "prefill"):
            continue
        seen = set()
        for knobs in settings:
            function = KERNEL.build(spec, target, kind, knobs)
            text = function.script()
            if text in seen:  # the knob makes no difference here
                continue
            seen.add(text)
            library = compile_function(function, target)
            for batch in batches:
                call = Call(name, asdict(spec), batch, knobs)
                call.launches = [
                    describe(*launch, archive) for launch in trace(library, spec, batch)
                ]
                calls.append(call)
    return calls


def read_only(spec: PhaseSpec) -> Any:
    """Return a kernel with the arguments of a call that only reads the codes, 64 bytes at a time.

    What it takes is what memory takes; nothing that multiplies can take less.
    """
    arrays = KERNEL.layout.arrays(spec)
    (rows, words), threads, groups, lanes, together = arrays["codes"].shape, 256, 132 * 8, 4, 4
    pieces = rows * words // (lanes * together)

    def body() -> None:
        T.arg("x", T.buffer((1, spec.in_features), spec.dtype))
        codes = T.arg("codes", T.buffer((rows * words,), "uint32"))
        T.arg("scales", T.buffer(arrays["scales"].shape, "float32"))
        y = T.arg("y", T.buffer((1, spec.out_features), spec.out_dtype))
        with launch({"blockIdx.x": groups, "threadIdx.x": threads}) as (group, thread):
            sums = local((lanes,), "uint32")
            store(sums, T.ramp(0, 1, lanes), T.broadcast(T.uint32(0), lanes))
            own = group * threads + thread
            all_threads = groups * threads

            def read(at: Any) -> None:
                for i in range(together):
                    # Neighbours read neighbouring words.
                    first = (i * pieces + at) * lanes
                    read = codes[T.ramp(first, 1, lanes)]
                    store(sums, T.ramp(0, 1, lanes), sums[T.ramp(0, 1, lanes)] ^ read)

            strided(pieces, own, all_threads, read)
            total = sums[0] ^ sums[1] ^ sums[2] ^ sums[3]
            with when(total == T.uint32(1)):  # so that nothing is left out
                store(y, (0, 0), T.cast(total, spec.out_dtype))

    return build_function("read_only", body).without_attr("global_symbol")


def compile_function(function: Any, target: Target) -> Any:
    """Return a loaded library with the one function ``main``."""
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    return tvm.compile(module, target=target.to_tvm())


def describe(
    kernel: ShaderKernel,
    buffers: Sequence[int],
    scalars: Sequence[Any],
    grid: Sequence[int],
    archive: zipfile.ZipFile,
) -> dict[str, Any]:
    """Return a launch as JSON, and put its kernel into the archive."""
    file = hashlib.sha256(kernel.code).hexdigest()[:16] + ".spv"
    if file not in archive.namelist():
        archive.writestr(file, kernel.code)
    return {
        "kernel": file,
        "entry": kernel.name,
        "arguments": kernel.arguments,
        "uniform_buffer": kernel.uniform_buffer,
        "buffers": list(buffers),
        "scalars": list(scalars),
        "grid": list(grid),
    }


def trace(library: Any, spec: PhaseSpec, batch: int, flat: bool = False) -> list[tuple]:
    """Return the launches of one call, as the host code makes them, without a device.

    Args:
        library: with the function ``main``.
        spec: of the call.
        batch: rows of x.
        flat: codes are an array of one dimension.
    """
    arrays = KERNEL.layout.arrays(spec)
    codes, scales = arrays["codes"], arrays["scales"]
    sizes = [
        ((batch, spec.in_features), spec.dtype),
        ((codes.shape[0] * codes.shape[1],) if flat else codes.shape, codes.dtype),
        (scales.shape, scales.dtype),
        ((batch, spec.out_features), spec.out_dtype),
    ]
    launches: list[tuple] = []
    addresses: list[int] = []

    def allocate(nbytes: int) -> Any:
        """Return memory that is never touched."""
        memory = np.empty(nbytes, np.uint8)
        addresses.append(memory.ctypes.data)
        nothing = np.empty(0, np.uint8)
        return SimpleNamespace(address=addresses[-1], memory=memory, array=lambda: nothing)

    def dispatch(kernel: ShaderKernel, buffers: Sequence[Any], grid: Any, scalars: Any) -> None:
        order = [addresses.index(buffer.address) for buffer in buffers]
        launches.append((kernel, order, list(scalars), grid))

    device = SimpleNamespace(allocate=allocate, free=lambda buffer: None, dispatch=dispatch)
    with mock.patch.object(vulkan_runtime, "device", return_value=device):
        tensors = [tvm.runtime.empty(size, dtype, tvm.vulkan()) for size, dtype in sizes]
        library["main"](*tensors)
        del tensors
    return launches
