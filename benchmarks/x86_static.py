"""Static estimates of the x86 prefill kernels: llvm-mca's cycles of the loops that multiply panels.

For instruction sets that the machine at hand lacks. Not a measurement: all loads hit L1, and the
decoding of panels, the scaling of sums and the quantisation of activations are left out. Measured
beside it, `kernel_x86.py --batch 512` tells what these add.

    python benchmarks/x86_static.py        # needs llvm-mca, e.g. from Debian's package llvm
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import tvm

from fairy_compile.kernels.x86 import AVX2, AVX512_VBMI, AVX_VNNI, Isa, X86Codebook
from fairy_compile.op import PhaseSpec
from fairy_compile.targets import Target

# LLVM's names of a core to compile for, cores to estimate, the instruction that multiplies bytes.
KERNELS: tuple[tuple[Isa, str, tuple[str, ...], str], ...] = (
    (AVX512_VBMI, "icelake-server", ("icelake-server", "sapphirerapids"), "vpdpbusd"),
    (AVX_VNNI, "alderlake", ("alderlake",), "vpdpbusd"),
    (AVX2, "haswell", ("haswell", "skylake", "znver3"), "vpmaddubsw"),
)
_ITERATIONS = 1000


def assembly(isa: Isa, cpu: str) -> str:
    """Return the assembly of the kernel for many rows; T = 2, combined panels."""
    kernel, spec = X86Codebook(isa), PhaseSpec((2048,), 2048, 2, ("U", "W"), "tensor", "int8")
    target = Target("static", "", {"kind": "llvm", "mcpu": cpu}, frozenset(isa.features), ())
    function = kernel.build(spec, target, "many", {})
    return tvm.compile(function, target=target.to_tvm()).mod.inspect_source("s")


def multiply_loop(text: str, opcode: str) -> list[str]:
    """Return the densest loop of one block: that with the largest share of ``opcode``."""
    loops = []
    for match in re.finditer(r"^(\.L\w+):.*\n((?:\t.*\n)+?)\tj\w+\t\1\b", text, re.MULTILINE):
        body = [line for line in match[2].splitlines() if re.match(r"\t[a-z{]", line)]
        loops.append((_count(body, opcode) / max(1, len(body)), body))
    return max(loops)[1]


def cycles(body: list[str], core: str) -> float | None:
    """Return llvm-mca's cycles of an iteration, or None if it does not know the core."""
    program = shutil.which("llvm-mca-22") or shutil.which("llvm-mca")
    if program is None:
        sys.exit("llvm-mca is not installed; Debian has it in the package llvm")
    command = [program, "-mtriple=x86_64", f"-mcpu={core}", f"-iterations={_ITERATIONS}"]
    done = subprocess.run(
        command, input="\n".join(body), capture_output=True, text=True, check=False
    )
    found = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    return int(found[1]) / _ITERATIONS if found else None


def _count(body: list[str], opcode: str) -> int:
    return sum(opcode in line for line in body)


def main() -> None:
    """Print the table."""
    print("| kernel | core model | instructions | products | cycles | products a cycle | spills |")
    print("|---|---|---|---|---|---|---|")
    for isa, cpu, cores, opcode in KERNELS:
        body = multiply_loop(assembly(isa, cpu), opcode)
        products = _count(body, opcode) * isa.width
        spills = sum("(%rsp)" in line for line in body)
        for core in cores:
            taken = cycles(body, core)
            figures = ("-", "-") if taken is None else (f"{taken:.2f}", f"{products / taken:.0f}")
            print(
                f"| {isa.name} | {core} | {len(body)} | {products} | {' | '.join(figures)} |"
                f" {spills} |"
            )


if __name__ == "__main__":
    main()
