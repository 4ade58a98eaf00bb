"""Static checks of the CUDA kernels: registers, spills and the instructions of their inner loops.

Compiles the kernels of a LLaMA-2-7B layer for several architectures and reads the machine code. Not
a measurement. An instruction of the inner loop is one of a warp, for 32 lanes; a scheduler issues
one in a clock, and a multiprocessor has four. A kernel that takes `i` instructions for every byte
of weights of a lane reads at most 128 / i bytes of weights in a clock, which is to be compared with
what memory delivers.

    pip install nvidia-cuda-nvdisasm     # and nvcc
    python benchmarks/cuda_static.py
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fairy_compile.compiler.cuda_binary import find_tool
from fairy_compile.kernels.cuda import CudaPlanes
from fairy_compile.kernels.cuda_grid import Launch
from fairy_compile.kernels.cuda_hopper import ARCH, CudaHopper
from fairy_compile.op import PhaseSpec

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100")
# Bytes of memory that a multiprocessor gets in a clock: nominal bandwidth, multiprocessors, clock.
MEMORY = {
    "sm_80": ("A100", 1555e9, 108, 1.41e9),
    "sm_86": ("RTX 3090", 936e9, 82, 1.70e9),
    "sm_89": ("RTX 4090", 1008e9, 128, 2.52e9),
    "sm_90": ("H200", 4800e9, 132, 1.75e9),
    "sm_100": ("B200", 8000e9, 148, 1.85e9),
}
# Blocks whose warps loop over groups of columns, one a turn; by default a turn may be two groups,
# or there is none where groups are few.
LOOPS = {"row_tiles": 4, "warps": 8, "asked": 1}
_OPCODE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]*)(.*)$")


@dataclass(frozen=True)
class Code:
    """What the compiler made of a kernel."""

    registers: int
    spilled: int
    shared: int
    warnings: int  # of multiplications that the assembler could not let overlap
    loop: Counter[str]

    def count(self, prefix: str) -> int:
        """Return the instructions of the inner loop whose opcode starts with ``prefix``."""
        return sum(n for opcode, n in self.loop.items() if opcode.startswith(prefix))


def compile_kernel(launch: Launch, dtype: str, arch: str, folder: Path) -> Code:
    """Compile a launch as a kernel of its own and read it."""
    source, binary = folder / "kernel.cu", folder / "kernel.cubin"
    x, shared, pointer = f"const {dtype}* x", "", ""
    if launch.image_bytes:
        x, pointer = "const unsigned char* x", ", shared"
        shared = "  extern __shared__ __align__(128) unsigned char shared[];\n"
    kernel = (
        f'\nextern "C" __global__ void __launch_bounds__({launch.threads}) kernel('
        f"{x}, const unsigned char* codes, const float* scales, {dtype}* y, int batch) {{\n"
        f"{shared}  {launch.function}(x, codes, scales, y, batch{pointer});\n}}\n"
    )
    source.write_text(launch.source + kernel, "utf-8")
    options = ["-cubin", f"-arch={arch}", "-O3", "-std=c++17", "--use_fast_math", "-Xptxas=-v"]
    command = [find_tool("nvcc"), *options, "-o", str(binary), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    log = done.stderr + done.stdout
    warnings = [line for line in log.splitlines() if "Potential Performance Loss" in line]
    sass = subprocess.run(
        [find_tool("nvdisasm"), "-c", str(binary)], capture_output=True, text=True, check=True
    ).stdout
    return Code(
        registers=_number(r"Used (\d+) registers", log),
        spilled=_number(r"(\d+) bytes spill stores", log),
        shared=_number(r"(\d+) bytes smem", log) + launch.shared,
        warnings=len(warnings),
        loop=inner_loop(sass),
    )


def inner_loop(sass: str) -> Counter[str]:
    """Return the opcodes of the innermost loop that has the most matrix instructions.

    A loop is what lies between a label and the last branch back to it that no other label's loop
    with matrix instructions lies in.
    """
    labels: dict[str, int] = {}
    opcodes: list[str] = []
    loops = []
    for line in sass.splitlines():
        label = re.match(r"^(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = len(opcodes)
            continue
        found = _OPCODE.match(line)
        if not found:
            continue
        opcodes.append(found[3])
        target = re.search(r"`\((\.L_x_\d+)\)", found[4])
        if found[3].startswith("BRA") and target and target[1] in labels:
            loops.append((labels[target[1]], len(opcodes)))
    candidates = [
        Counter(opcodes[a:b])
        for a, b in loops
        if any("MMA" in opcode for opcode in opcodes[a:b])
        and not any(
            a <= c and d <= b and (c, d) != (a, b) and _has_mma(opcodes[c:d]) for c, d in loops
        )
    ]
    return max(candidates, key=lambda c: sum(n for o, n in c.items() if "MMA" in o))


def _has_mma(opcodes: Sequence[str]) -> bool:
    return any("MMA" in opcode for opcode in opcodes)


def _number(pattern: str, text: str) -> int:
    return sum(int(n) for n in re.findall(pattern, text))


def specs() -> list[PhaseSpec]:
    """Return the calls to look at."""
    both = ("U", "W")
    return [
        PhaseSpec((2048,), 2048, stages, both, scale, act, "float16", "float16")
        for stages, scale, act in (
            (2, "tensor", "int16"),
            (2, "tensor", "int8"),
            (2, "row", "int16"),
            (2, "tile64", "int16"),
            (1, "tensor", "int16"),
            (3, "tensor", "int16"),
            (4, "tensor", "int16"),
        )
    ]


def decode_rows(arch: str, folder: Path) -> list[str]:
    """Return the table rows of the kernels for one row of x."""
    kernel = CudaPlanes()
    rows = []
    _, bandwidth, processors, clock = MEMORY[arch]
    needed = bandwidth / processors / clock
    for spec in specs():
        (launch,) = kernel.launches(spec, "single", LOOPS)
        code = compile_kernel(launch, "__half", arch, folder)
        loads = _wide_loads(code)
        instructions = sum(code.loop.values())
        per_byte = instructions / (16 * loads)
        rows.append(
            f"| {arch} | T={spec.stages} {spec.scale} {spec.act} | {code.registers} |"
            f" {code.spilled} | {loads} | {code.count('IMMA')} | {code.count('LOP3')} |"
            f" {code.count('I2F')} | {instructions} | {per_byte:.2f} | {128 / per_byte:.0f} |"
            f" {needed:.1f} |"
        )
    return rows


def prefill_rows(arch: str, folder: Path) -> list[str]:
    """Return the table rows of the kernels for many rows of x."""
    kernel = CudaPlanes()
    rows = []
    for spec in specs()[:1] + specs()[2:5]:
        for launch in kernel.launches(spec, "many", {}):
            if not launch.function.startswith("prefill"):
                continue
            code = compile_kernel(launch, "__half", arch, folder)
            loads = _wide_loads(code)
            rows.append(
                f"| {arch} | T={spec.stages} {spec.scale} | {launch.rows} | {launch.splits} |"
                f" {launch.threads} | {code.registers} | {code.spilled} | {code.shared} | {loads} |"
                f" {code.count('HMMA')} | {code.count('LDS')} | {code.count('LDGSTS')} |"
                f" {sum(code.loop.values())} |"
            )
    return rows


def hopper_rows(folder: Path) -> list[str]:
    """Return the table rows of the kernels for many rows of x on Hopper."""
    rows = []
    for spec in specs()[:1] + specs()[2:5]:
        wide = [
            g for g in CudaHopper().launches(spec, "many", {}) if g.function.startswith("hopper")
        ]
        for launch in wide:
            code = compile_kernel(launch, "__half", ARCH, folder)
            rows.append(
                f"| {ARCH} | T={spec.stages} {spec.scale} | {launch.rows} | {launch.splits} |"
                f" {launch.threads} | {code.registers} | {code.spilled} | {code.shared} |"
                f" {code.warnings} | {_wide_loads(code)} | {code.count('HGMMA')} |"
                f" {code.count('LDS')} | {sum(code.loop.values())} |"
            )
    return rows


def _wide_loads(code: Code) -> int:
    """Return the 128-bit loads from global memory."""
    return sum(n for o, n in code.loop.items() if o.startswith("LDG.") and ".128" in o)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", choices=ARCHS, help="default: all")
    archs = parser.parse_args().arch or ARCHS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(
            "| arch | call | registers | spilled bytes | 128-bit loads | IMMA | LOP3 | I2F |"
            " instructions | a byte | bytes a clock | memory gives |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|---|---|")
        for arch in archs:
            print("\n".join(decode_rows(arch, folder)), flush=True)
        print(
            "\n| arch | call | rows of x | shares | threads | registers | spilled bytes |"
            " shared bytes | 128-bit loads | HMMA | LDS | LDGSTS | instructions |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
        for arch in archs:
            print("\n".join(prefill_rows(arch, folder)), flush=True)
        print(
            "\n| arch | call | rows of x | shares | threads | registers | spilled bytes |"
            " shared bytes | serialised | 128-bit loads | HGMMA | LDS | instructions |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
        print("\n".join(hopper_rows(folder)), flush=True)


if __name__ == "__main__":
    main()
