"""Running CUDA kernels on this machine's CPU: C++ with `cuda_shim.h` in place of the hardware.

Emulation shows that results are right, that threads that share data wait for each other, and that
no array is read or written beyond its end. It says nothing about speed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes  # noqa: F401  bfloat16 for NumPy
import numpy as np

from fairy_compile.kernels.cuda_grid import Launch
from fairy_compile.kernels.cuda_source import CUDA_TYPES

HERE = Path(__file__).parent
# Undefined shifts, indices and alignments end the program; local variables start as garbage.
FLAGS = (
    "-std=c++17", "-O1", "-w", "-ffp-contract=off", "-ftrivial-auto-var-init=pattern",
    "-fno-strict-aliasing", "-fsanitize=bounds,alignment,shift,signed-integer-overflow",
    "-fno-sanitize-recover=all",
)  # fmt: skip


_PRIMITIVES = re.compile("#ifndef (FAIRY_(?:HOPPER_)?PRIMITIVES)\n.*?#endif  // \\1", re.DOTALL)


def missing_tools() -> str | None:
    """Return what to install to run these tests, or None."""
    return None if shutil.which("g++") else "needs a C++ compiler, Debian's package g++"


class Emulator:
    """A program that runs any of some launches, all with one dtype of x and one of y."""

    def __init__(self, launches: Sequence[Launch], folder: Path, x: str, y: str) -> None:
        self.functions = {launch.function: launch for launch in launches}
        self.order = list(self.functions)
        self.out_dtype = y
        x, y = CUDA_TYPES[x], CUDA_TYPES[y]
        shims = ("cuda_shim.h", "cuda_shim_hopper.h")
        parts = [(HERE / shim).read_text("utf-8") for shim in shims]
        parts += [for_shim(launch.source) for launch in self.functions.values()]
        parts.append("static void *pointers[5], *scratch;\nstatic int rows;")
        table = []
        for name in self.order:
            launch = self.functions[name]
            given, shared, arrange = f"(const {x}*)pointers[0]", "", "0, 0, 0, 0, nullptr"
            out, add = f"({y}*)pointers[3]", "1, 0, 0, 0, nullptr"
            bias = "(const float*)pointers[4], " if launch.bias else ""
            if launch.image_bytes:
                given = "(const unsigned char*)pointers[0]"
                shared = ", emulated::dynamic_bytes"
            if own := launch.arrange:
                given = "(const unsigned char*)scratch"
                parts.append(
                    f"static void {own.function}_run() {{ {own.function}((const {x}*)pointers[0], "
                    "(unsigned char*)scratch, rows); }"
                )
                arrange = (
                    f"{own.blocks}, {own.threads}, {own.rows}, {launch.image_bytes}, "
                    f"{own.function}_run"
                )
            if own := launch.add:
                out = "scratch"
                parts.append(
                    f"static void {own.function}_run() {{ {own.function}((unsigned char*)scratch, "
                    f"{bias}({y}*)pointers[3], rows); }}"
                )
                row_bytes = launch.sum_bytes // launch.rows
                add = f"{launch.splits}, {row_bytes}, {own.blocks}, {own.threads}, "
                add += f"{own.function}_run"
            parts.append(
                f"static void run_{name}() {{ {name}({given}, (const unsigned char*)pointers[1], "
                f"(const float*)pointers[2], {bias}{out}, rows{shared}); }}"
            )
            table.append(f"{{{launch.threads}, {launch.rows}, run_{name}, {arrange}, {add}}}")
        parts.append(
            "struct Launch { unsigned threads, rows; void (*run)(); unsigned arrange_blocks, "
            "arrange_threads, arrange_rows; size_t image_bytes; void (*arrange)(); "
            "unsigned splits; size_t row_sum_bytes; unsigned add_blocks, add_threads; "
            f"void (*add)(); }} launches[] = {{{', '.join(table)}}};"
        )
        parts.append((HERE / "run_cuda.cpp").read_text("utf-8"))
        source, self.program = folder / "emulated.cpp", folder / "emulated"
        source.write_text("\n".join(parts), "utf-8")
        command = ["g++", *FLAGS, f"-I{HERE}", str(source), "-o", str(self.program)]
        subprocess.run(command, check=True)

    def run(
        self,
        launch: Launch,
        x: np.ndarray,
        codes: np.ndarray,
        scales: np.ndarray,
        features: int,
        order: int = 0,
        bias: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return y (rows, features).

        Args:
            launch: one of those the emulator was made of.
            x: (rows, 2m), or what else the launch takes in its place.
            codes, scales: packed weight.
            features: real output features.
            order: of threads; 0 rising, 1 falling, others random.
            bias: float32 (features,) of launches that add one.
        """
        bias = np.empty(0, np.float32) if bias is None else bias
        y_bytes = len(x) * features * np.dtype(self.out_dtype).itemsize
        head = [self.order.index(launch.function), launch.blocks, -(-len(x) // launch.rows)]
        head += [order, len(x), x.nbytes, codes.nbytes, scales.nbytes, y_bytes]
        head.append(bias.nbytes)
        arrays = (np.array(head, np.int64), x, codes, scales, bias)
        done = subprocess.run(
            [str(self.program)],
            input=b"".join(np.ascontiguousarray(a).tobytes() for a in arrays),
            capture_output=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{launch.function}: {done.returncode} {done.stderr.decode()}")
        return np.frombuffer(done.stdout, self.out_dtype).reshape(len(x), features)


def for_shim(source: str) -> str:
    """Leave out primitives.cuh, whose functions the shim has, and use its shared memory."""
    kernels = _PRIMITIVES.sub("", source)
    emulated = "Shared& shared = emulated::shared_memory<Shared>();"
    kernels = kernels.replace("__shared__ Shared shared;", emulated)
    return re.sub(r"__shared__ (alignas\(\d+\))", r"\1 static", kernels)
