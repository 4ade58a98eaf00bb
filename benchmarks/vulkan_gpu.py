"""Vulkan phase kernels on a GPU: numbers first, then times beside the copy bandwidth.

Two steps, so that the GPU machine needs no TVM, only NumPy, PyPI's `vulkan` and a Vulkan driver:

    PYTHONPATH=. python benchmarks/vulkan_gpu.py build -o vulkan-kernels
    PYTHONPATH=. python benchmarks/vulkan_gpu.py run vulkan-kernels -o results.json --seconds 60

`run` compares rows of every call with a float64 reference on fresh random data, and leaves a kernel
that is wrong out of the times. Decode settings are tried on two shapes first; the best of them are
then timed on all. Launches wait for one another, as in a model, and read copies of the weights in
turn that do not fit the L2 cache together. Times are the device's own. Results are written after
every call, so that a run that is stopped has given what it measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.vulkan_timing import Launch, LocalBuffer, NvidiaClocks, TimedDevice
from fairy_compile.op import PhaseSpec
from tests.emulation.vulkan_module import ShaderKernel

SHAPES = {  # (output, input) features
    "7b-gate-up": (22016, 4096),
    "70b-gate-up": (57344, 8192),
    "7b-o": (4096, 4096),
    "7b-down": (4096, 11008),
    "70b-o": (8192, 8192),
    "70b-down": (8192, 28672),
    "small": (96, 128),  # for a trial on lavapipe
}
SWEPT = ("7b-gate-up", "70b-gate-up", "7b-o", "small")
"""Shapes on which every setting is tried."""
DECODE, PREFILL = (1, 2, 8), (64, 512)
_BEST = 3  # settings timed on the other shapes
_L2_BYTES = 60 << 20  # of an H200
_CHECKED_ROWS = 64
# Errors of the norm, see `PhaseSpec.dtype`: weights and outputs rounded to float16, and for the
# settings with float16 products as much again.
_ERROR = 4e-3


@dataclass
class Call:
    """One compiled call: a shape, a number of rows of x, settings, and the launches they make.

    Attributes:
        launches: (kernel file, indices of x, codes, scales, y for its buffers, scalars, grid).
    """

    shape: str
    spec: dict[str, Any]
    batch: int
    knobs: dict[str, Any]
    launches: list[dict[str, Any]] = field(default_factory=list)

    @property
    def setting(self) -> str:
        """The knobs in one word."""
        return ",".join(f"{k}={v}" for k, v in self.knobs.items()) or "default"


def read_spec(fields: dict[str, Any]) -> PhaseSpec:
    """Return a spec that was written as JSON."""
    return PhaseSpec(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


# ------------------------------------------------------------------------------ run


def random_weights(spec: PhaseSpec, shapes: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return codes and scales of a call with one scale for each part of a plane."""
    rng = np.random.default_rng()
    codes = rng.integers(0, 2**32, shapes["codes"], np.uint32)
    scales = rng.uniform(0.005, 0.02, shapes["scales"][2:]).astype(np.float32)
    return codes, np.ascontiguousarray(np.broadcast_to(scales, shapes["scales"]))


def complex_rows(spec: PhaseSpec, codes: np.ndarray, scales: np.ndarray) -> dict[str, np.ndarray]:
    """Return complex matrices of rows of packed codes, by term.

    Written from the text of `fairy_compile.kernels.gpu_layout`, so that it checks the kernels'
    reading of it.
    """
    stages, terms = spec.stages, len(spec.terms)
    words = codes.reshape(len(codes), -1, terms, stages)
    columns = np.arange(words.shape[1] * 16)
    matrices = {}
    for k, term in enumerate(spec.terms):
        total = np.zeros((len(codes), columns.size), complex)
        for t in range(stages):
            width = 4 if t ^ 1 < stages else 2
            inside = columns % 16
            word = 2 * (t // 2) + inside // (32 // width)
            bit = width * (inside % (32 // width)) + 2 * (t % 2)
            code = words[:, columns // 16, k, word] >> bit.astype(np.uint32) & np.uint32(3)
            re, im = scales[0, 0, k * stages + t].astype(float)
            total += np.choose(code, [re, 1j * im, -re, -1j * im])
        matrices[term] = total[:, : spec.m]
    return matrices


def reference(spec: PhaseSpec, codes: np.ndarray, scales: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return Ux + W conj(x) of rows of the matrix in float64, complex (batch, rows)."""
    given = x[:, : spec.m].astype(float) + 1j * x[:, spec.m :].astype(float)
    y = np.zeros((len(x), len(codes)), complex)
    for term, matrix in complex_rows(spec, codes, scales).items():
        y += (given if term == "U" else given.conj()) @ matrix.T
    return y


class Bench:
    """Checks and times the calls of a folder."""

    def __init__(
        self, folder: Path, seconds: float, output: Path | None, load: float = 0.15
    ) -> None:
        self.until = time.monotonic() + seconds
        self.clocks = NvidiaClocks()
        self.output, self.device, self.load = output, TimedDevice(), load
        self._archive = zipfile.ZipFile(folder / "kernels.zip")
        self.calls = [Call(**entry) for entry in json.loads((folder / "calls.json").read_text())]
        self.shapes = json.loads((folder / "shapes.json").read_text())
        self.results: dict[str, Any] = {"device": self.device.name, "rows": [], "wrong": []}
        self._kernels: dict[str, ShaderKernel] = {}
        self._weights: dict[tuple[str, int], list[tuple[LocalBuffer, LocalBuffer]]] = {}
        self._host: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}

    def run(self) -> None:
        """Measure as much as time allows, the most telling first."""
        bandwidth = self.copy_bandwidth()
        self.results |= {
            "copy_gb_per_s": bandwidth,
            "memory_types": self.device.memory_types,
            "cuda_context": self.clocks.context,
            "clocks": self.clocks.read(),
        }
        print(f"memory: {self.device.memory_types}, CUDA context: {self.clocks.context}")
        print(f"{self.device.name}: copies {bandwidth:.0f} GB/s, read and written\n")
        print(
            "| call | T | rows of x | error | us | us, overlapping | us, empty | GB/s | of copy |"
            " SM MHz | setting |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
        for shape, stages, batch in self._order():
            calls = [
                c
                for c in self.calls
                if (c.shape, c.spec["stages"], c.batch) == (shape, stages, batch)
            ]
            if batch in DECODE and shape not in SWEPT:
                best = self._best(stages, batch)
                calls = [c for c in calls if c.setting in best] or calls[:1]
            for call in calls:
                if time.monotonic() > self.until:
                    self.results["stopped"] = "out of time"
                    self._save()
                    print("\nout of time")
                    return
                self._measure(call, bandwidth)
            self._forget(shape, stages)
        self._save()

    def _order(self) -> list[tuple[str, int, int]]:
        keys = dict.fromkeys((c.shape, c.spec["stages"], c.batch) for c in self.calls)

        def rank(key: tuple[str, int, int]) -> tuple[Any, ...]:
            shape, stages, batch = key
            return (batch in PREFILL, stages == 1, shape not in SWEPT, batch != 1)

        return sorted(keys, key=rank)

    def _best(self, stages: int, batch: int) -> list[str]:
        """Return the settings that were best on the shapes tried, summed over shapes."""
        rates: dict[str, float] = {}
        for row in self.results["rows"]:
            if (row["stages"], row["batch"]) == (stages, batch) and row["shape"] in SWEPT:
                rates[row["setting"]] = rates.get(row["setting"], 0) + row["gb_per_s"]
        return sorted(rates, key=lambda s: -rates[s])[:_BEST]

    def _measure(self, call: Call, bandwidth: float) -> None:
        spec = read_spec(call.spec)
        rng = np.random.default_rng()
        x = rng.standard_normal((call.batch, spec.in_features)).astype(spec.dtype)
        y = np.full((call.batch, spec.out_features), np.nan, spec.out_dtype)
        copies = self._copies(call)
        given, result = self.device.upload(x), self.device.upload(y)
        try:
            start = time.perf_counter()
            first = self._launches(call, given, copies[0], result)
            self.device.launch(first)
            compiled = time.perf_counter() - start
            codes, scales = self._host[call.shape, spec.stages]
            error = check(spec, codes, scales, x, self.device.download(result, y))
            if not error <= _ERROR and "read" not in call.knobs:
                self.results["wrong"].append(asdict(call) | {"error": error})
                print(f"WRONG: {call.shape} {call.batch} {call.setting}: error {error:.2e}")
                return
            machine_code = self.device.statistics(first[0])
            times = self._time(call, given, copies, result)
            clocks = self.clocks.read()
        except Exception as failure:  # of a driver: the others are still worth measuring
            self.results["wrong"].append(asdict(call) | {"failure": repr(failure)})
            print(f"FAILED: {call.shape} {call.batch} {call.setting}: {failure!r}")
            return
        finally:
            self.device.release(given, result)
        seconds = times["waiting"]
        rate = (codes.nbytes + scales.nbytes) / seconds / 1e9
        row = {
            "shape": call.shape, "stages": spec.stages, "batch": call.batch, "error": error,
            "us": seconds * 1e6, "gb_per_s": rate, "of_copy": rate / bandwidth,
            "setting": call.setting, "first_launch_s": compiled,
            "overlapping_us": times["overlapping"] * 1e6, "empty_us": times["empty"] * 1e6,
            **clocks, "machine_code": machine_code,
        }  # fmt: skip
        self.results["rows"].append(row)
        self._save()
        print(
            f"| {call.shape} | {spec.stages} | {call.batch} | {error:.1e} | {row['us']:.1f} |"
            f" {row['overlapping_us']:.1f} | {row['empty_us']:.1f} | {rate:.0f} |"
            f" {row['of_copy']:.0%} | {row.get('sm_mhz', '-')} | {call.setting} |"
            + " ".join(f"{k}={v}" for k, v in machine_code.items()),
            flush=True,
        )

    def _time(
        self, call: Call, given: LocalBuffer, copies: list, result: LocalBuffer
    ) -> dict[str, float]:
        """Return the seconds of a call: waiting for the one before it, overlapping it, and of none.

        A launch of one thread group stands for none.
        """

        def many(count: int) -> list[Launch]:
            return [
                launch
                for i in range(count)
                for launch in self._launches(call, given, copies[i % len(copies)], result)
            ]

        estimate = self.device.launch(many(4), seconds=0.05) / 4
        count = int(min(200, max(3, 4e-3 / max(estimate, 1e-7))))
        launches = many(count)
        empty = [replace(launch, grid=(1, 1, 1)) for launch in launches]
        return {
            "waiting": self.device.launch(launches, self.load) / count,
            "overlapping": self.device.launch(launches, self.load / 3, overlap=True) / count,
            "empty": self.device.launch(empty, self.load / 6) / count,
        }

    def _launches(
        self, call: Call, given: LocalBuffer, weights: tuple, result: LocalBuffer
    ) -> list[Launch]:
        arguments = (given, *weights, result)
        return [
            Launch(
                self._kernel(launch),
                [arguments[i] for i in launch["buffers"]],
                launch["scalars"],
                tuple(launch["grid"]),
            )
            for launch in call.launches
        ]

    def _kernel(self, launch: dict[str, Any]) -> ShaderKernel:
        file = launch["kernel"]
        if file not in self._kernels:
            self._kernels[file] = ShaderKernel(
                launch["entry"],
                tuple(map(tuple, launch["arguments"])),
                (),
                launch["uniform_buffer"],
                self._archive.read(file),
            )
        return self._kernels[file]

    def _copies(self, call: Call) -> list[tuple[LocalBuffer, LocalBuffer]]:
        """Return copies of the weights on the device that do not fit its L2 cache together."""
        spec = read_spec(call.spec)
        key = call.shape, spec.stages
        if key not in self._weights:
            self._host[key] = random_weights(spec, self.shapes[f"{call.shape}-{spec.stages}"])
            codes, scales = map(self.device.upload, self._host[key])
            count = 1 + 2 * _L2_BYTES // codes.nbytes if codes.nbytes < 2 * _L2_BYTES else 1
            count = 1 if call.shape == "small" else count
            others = [self.device.duplicate(codes) for _ in range(count - 1)]
            self._weights[key] = [(c, scales) for c in (codes, *others)]
        return self._weights[key]

    def _forget(self, shape: str, stages: int) -> None:
        """Free weights of shapes that are done with."""
        key = shape, stages
        held = sum(c.nbytes for copies in self._weights.values() for c, _ in copies)
        if held > 8 << 30 and key in self._weights:
            copies = self._weights.pop(key)
            self.device.release(*(codes for codes, _ in copies), copies[0][1])

    def copy_bandwidth(self) -> float:
        """Return the GB/s that copies on the device read and write together."""
        nbytes = (1 << 30) if "llvmpipe" not in self.device.name else (16 << 20)
        return self.device.copy_rate(nbytes) / 1e9

    def _save(self) -> None:
        if self.output:
            self.output.write_text(json.dumps(self.results, indent=1), "utf-8")


def check(
    spec: PhaseSpec, codes: np.ndarray, scales: np.ndarray, x: np.ndarray, y: np.ndarray
) -> float:
    """Return the error of the first and last rows, relative to their norm."""
    some = min(_CHECKED_ROWS, spec.n)
    rows = np.unique(np.r_[:some, spec.n - some : spec.n])
    want = reference(spec, codes[rows], scales, x)
    got = y[:, rows].astype(float) + 1j * y[:, spec.n + rows].astype(float)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    builder = verbs.add_parser("build", help="compile the calls; needs TVM")
    builder.add_argument("-o", "--output", type=Path, required=True)
    builder.add_argument("--shape", action="append", choices=list(SHAPES))
    builder.add_argument("--only", choices=["decode", "prefill"])
    builder.add_argument("--stages", type=int, nargs="+", default=[2, 1])
    builder.add_argument("--target", default="vulkan-nvidia")
    builder.add_argument("--simd-width", type=int, help="of another device, such as 8 of lavapipe")
    runner = verbs.add_parser("run", help="check and time the calls; needs a Vulkan device")
    runner.add_argument("folder", type=Path)
    runner.add_argument("-o", "--output", type=Path)
    runner.add_argument("--seconds", type=float, default=60)
    runner.add_argument("--load", type=float, default=0.15, help="seconds of load for one time")
    arguments = parser.parse_args()
    if arguments.verb == "build":
        from benchmarks.vulkan_gpu_build import build

        build(arguments)
        return
    bench = Bench(arguments.folder, arguments.seconds, arguments.output, arguments.load)
    bench.run()
    if bench.results["wrong"]:
        sys.exit(f"{len(bench.results['wrong'])} calls are wrong or failed")


if __name__ == "__main__":
    main()
