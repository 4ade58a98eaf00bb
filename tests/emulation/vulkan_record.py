"""Dispatches of the tests on file, so that a machine without TVM can repeat them on its GPU.

    export FAIRY_COMPILE_VULKAN_RECORD=dispatches.zip
    pytest tests/kernels/test_vulkan.py tests/codegen -k "spirv or vulkan and not subgroup"
    PYTHONPATH=. python -m tests.emulation.vulkan_record dispatches.zip -o results.json

The first command writes what every kernel was given and what it gave on this machine's device; the
tests check that against their references. The second runs the same kernels on the same inputs on
another device: integers must be equal, floats as near as `TOLERANCE` says. Kernels made for one
size of subgroups are not for another device, hence the ``-k``.
"""

from __future__ import annotations

import argparse
import atexit
import hashlib
import json
import os
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.emulation.vulkan_module import ShaderKernel, bound_buffers

RECORD_VARIABLE = "FAIRY_COMPILE_VULKAN_RECORD"
"""Environment variable: the file that dispatches are written to."""

TOLERANCE = {"float16": 4 * 2.0**-10, "float32": 1e-4, "float64": 1e-12}
"""Of the largest value of a buffer. Float16: two units in the last place on either side. Float32:
sums of up to 1000 values in another order, and Vulkan's own freedom in exponentials (about 10
units). Kernels whose results are exact agree exactly whatever this says."""

_DISPATCHES = 2  # recorded of one kernel
_LARGEST = 8 << 20


class Recorder:
    """Writes dispatches to a zip file; arrays and kernels that are equal are written once."""

    def __init__(self, file: Path) -> None:
        self._archive = zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9)
        self._seen: set[str] = set()
        self._counts: Counter[str] = Counter()
        self._entries: list[dict[str, Any]] = []
        atexit.register(self.close)

    def wants(self, kernel: ShaderKernel, nbytes: int) -> bool:
        """Tell whether a dispatch is one of those to record."""
        return nbytes <= _LARGEST and self._counts[_digest(kernel.code)] < _DISPATCHES

    def add(
        self,
        kernel: ShaderKernel,
        grid: Sequence[int],
        scalars: Sequence[Any],
        before: Sequence[bytes],
        after: Sequence[bytes],
    ) -> None:
        """Write one dispatch."""
        self._counts[_digest(kernel.code)] += 1
        self._entries.append(
            {
                "test": os.environ.get("PYTEST_CURRENT_TEST", "").split(" ")[0],
                "name": kernel.name,
                "code": self._put(kernel.code),
                "arguments": kernel.arguments,
                "uniform_buffer": kernel.uniform_buffer,
                "grid": list(grid),
                "scalars": [s if isinstance(s, float) else int(s) for s in scalars],
                "before": [self._put(data) for data in before],
                "after": [self._put(data) for data in after],
            }
        )

    def close(self) -> None:
        """Finish the file."""
        atexit.unregister(self.close)
        self._archive.writestr("dispatches.json", json.dumps(self._entries))
        self._archive.close()

    def _put(self, data: bytes) -> str:
        name = _digest(data)
        if name not in self._seen:
            self._seen.add(name)
            self._archive.writestr(name, data)
        return name


def recorder() -> Recorder | None:
    """Return the recorder that the environment asks for."""
    file = os.environ.get(RECORD_VARIABLE)
    return Recorder(Path(file)) if file else None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:20]


# -------------------------------------------------------------------------- repeating


def distance(seen: np.ndarray, wanted: np.ndarray) -> float:
    """Return the largest difference, relative to the largest value; infinite if NaNs differ."""
    if seen.dtype.kind != "f":
        return 0.0 if np.array_equal(seen, wanted) else float("inf")
    same = (seen == wanted) | (np.isnan(seen) & np.isnan(wanted))
    if same.all():
        return 0.0
    a, b = seen[~same].astype(float), wanted[~same].astype(float)
    if not (np.isfinite(a) & np.isfinite(b)).all():
        return float("inf")
    finite = wanted[np.isfinite(wanted)].astype(float)
    return float(np.abs(a - b).max() / np.abs(finite).max())


def repeat(file: Path, seconds: float) -> dict[str, Any]:
    """Run every dispatch of a file on this machine's device, and compare."""
    from tests.emulation.vulkan_device import device

    until = time.monotonic() + seconds
    archive = zipfile.ZipFile(file)
    entries = json.loads(archive.read("dispatches.json"))
    results: dict[str, Any] = {
        "device": device().name, "dispatches": 0, "of": len(entries),
        "kernels": len({entry["code"] for entry in entries}), "equal": 0, "largest": 0.0,
        "wrong": [],
    }  # fmt: skip
    for entry in entries:
        if time.monotonic() > until:
            break
        worst, why = _repeat_one(archive, entry)
        results["dispatches"] += 1
        results["equal"] += worst == 0.0
        if why is None:
            results["largest"] = max(results["largest"], worst)
        else:
            wrong = {"test": entry["test"], "kernel": entry["name"], "error": worst, "why": why}
            results["wrong"].append(wrong)
            print(f"WRONG {wrong}", flush=True)
    return results


def _repeat_one(archive: zipfile.ZipFile, entry: dict[str, Any]) -> tuple[float, str | None]:
    """Return the largest distance of a dispatch's buffers, and what is wrong, if anything."""
    from tests.emulation.vulkan_device import device

    code = archive.read(entry["code"])
    arguments = tuple(map(tuple, entry["arguments"]))
    kernel = ShaderKernel(entry["name"], arguments, (), entry["uniform_buffer"], code)
    arrays = [np.frombuffer(archive.read(name), np.uint8).copy() for name in entry["before"]]
    try:
        device().run(kernel, arrays, tuple(entry["grid"]), entry["scalars"])
    except Exception as failure:  # of a driver: the others are still worth running
        return float("inf"), repr(failure)
    worst, why = 0.0, None
    for binding, (_, dtype) in bound_buffers(code).items():
        if binding >= len(arrays):
            continue  # scalars in a uniform buffer
        wanted = np.frombuffer(archive.read(entry["after"][binding]), np.uint8)
        seen = arrays[binding]
        size = seen.size // np.dtype(dtype).itemsize * np.dtype(dtype).itemsize
        found = distance(seen[:size].view(dtype), wanted[:size].view(dtype))
        worst = max(worst, found)
        if found > TOLERANCE.get(dtype, 0.0):
            why = f"buffer {binding} of {dtype}"
    return worst, why


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Repeat recorded dispatches on this device.")
    parser.add_argument("file", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    arguments = parser.parse_args()
    results = repeat(arguments.file, arguments.seconds)
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1), "utf-8")
    print(json.dumps({k: v for k, v in results.items() if k != "wrong"}))
    if results["wrong"]:
        sys.exit(f"{len(results['wrong'])} dispatches differ")


if __name__ == "__main__":
    main()
