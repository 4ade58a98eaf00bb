"""Static counts of the GPU kernels' inner loops: operations for every byte of weights.

Compiles the OpenCL source of the decode kernels to LLVM's intermediate code and counts what their
inner loops do; the same kernels serve Metal and Vulkan, where only the sums at the end differ. Not
a measurement: a phone's compiler makes machine code of its own. But a GPU that does `a` operations
in the time it reads a byte from memory waits for arithmetic where a kernel takes more than `a`.

    apt-get install clang-22
    python benchmarks/gpu_static.py
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tvm

from fairy_compile.kernels.opencl import OPENCL_KERNELS
from fairy_compile.op import PhaseSpec
from fairy_compile.targets import load_target

CLANG = "clang-22"
_OPTIONS = [
    *("-x", "cl", "-cl-std=CL2.0", "-target", "spir64", "-Xclang", "-finclude-default-header"),
    *("-O2", "-ffp-contract=fast", "-fno-unroll-loops", "-fno-vectorize", "-fno-slp-vectorize"),
    *("-S", "-emit-llvm", "-w"),
]
_INTEGER = ("add", "sub", "mul", "shl", "lshr", "ashr", "and", "or", "xor", "icmp", "select")
# Kinds of LLVM's opcodes. Addresses, branches and moves are left out; so are loads of x and their
# conversion, which are calls of OpenCL's library and serve several rows of weights.
_KINDS = {
    "integer": (*_INTEGER, "trunc", "zext", "sext"),
    "float": ("fadd", "fsub", "fmul", "fneg", "fdiv", "fcmp"),
}
_KIND_OF = {opcode: kind for kind, opcodes in _KINDS.items() for opcode in opcodes}
_SHARED = 3  # its address space


@dataclass(frozen=True)
class Loop:
    """What one turn of the inner loop does.

    Attributes:
        counts: kind of operation -> how many.
        weight_bytes: bytes of weights it serves.
    """

    counts: Counter[str]
    weight_bytes: float

    def a_byte(self, *kinds: str) -> float:
        """Return the operations of some kinds for a byte of weights."""
        return sum(self.counts[kind] for kind in kinds) / self.weight_bytes


def inner_loop(spec: PhaseSpec, batch: str, knobs: dict[str, object], folder: Path) -> Loop:
    """Compile one kernel and return its inner loop over the columns of a unit."""
    target = load_target("opencl")
    kernel = OPENCL_KERNELS[0]
    function = kernel.build(spec, target, batch, knobs).with_attr("global_symbol", "main")
    module = tvm.tirx.build(tvm.IRModule({"main": function}), target=target.to_tvm())
    source, code = folder / "kernel.cl", folder / "kernel.ll"
    source.write_text(module.imports[0].inspect_source(), "utf-8")
    subprocess.run([CLANG, *_OPTIONS, "-o", str(code), str(source)], check=True)
    loops = [block for block in _self_loops(code.read_text("utf-8")) if _multiplies(block)]
    counts = Counter(_count(max(loops, key=len)))
    planes = len(spec.terms) * spec.stages
    rows, columns = int(knobs.get("rows", kernel.knobs["rows"][0])), 4
    return Loop(counts, columns * rows * planes * 2 / 8)


def _self_loops(code: str) -> list[list[str]]:
    """Return the lines of every block that ends with a branch to itself."""
    loops, label, lines = [], "", []
    for line in code.splitlines():
        found = re.match(r"^([\w.]+):", line)
        if found:
            label, lines = found[1], []
        elif line.startswith("  br ") and re.search(rf"label %{re.escape(label)}\b", line):
            loops.append(lines)
        else:
            lines.append(line)
    return loops


def _multiplies(block: list[str]) -> bool:
    return any("fmul" in line or "llvm.fmuladd" in line for line in block)


def _count(block: list[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for line in block:
        found = re.match(r"^  (?:%[\w.]+ = )?(?:tail )?(\w+) (.*)$", line)
        if not found:
            continue
        opcode, rest = found[1], found[2]
        lanes = re.search(r"<(\d+) x \w+>", rest)
        if opcode == "load":
            counts["shared load" if f"addrspace({_SHARED})" in rest else "other"] += 1
        elif opcode == "call":
            counts["float" if "fmuladd" in rest or "llvm.fma" in rest else "other"] += 1
        elif opcode in _KIND_OF:
            counts[_KIND_OF[opcode]] += int(lanes[1]) if lanes else 1
    return counts


def main() -> None:
    """Print the table."""
    both = ("U", "W")
    print("| call | rows of x | weights | integer | float | shared loads | arithmetic a byte |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        for stages, terms, scale in (
            (2, both, "tensor"),
            (1, both, "tensor"),
            (3, both, "tensor"),
            (4, both, "tensor"),
            (2, both, "row"),
            (2, both, "tile64"),
            (1, both, "tile64"),
            (2, ("W",), "tensor"),
        ):
            spec = PhaseSpec((2048,), 2048, stages, terms, scale, "float", "float16", "float16")
            for tokens in (1, 4):
                for weights in ("bits", "table"):
                    batch = "single" if tokens == 1 else "many"
                    knobs = {"weights": weights, "tokens": tokens}
                    loop = inner_loop(spec, batch, knobs, Path(name))
                    kinds = ("integer", "float", "shared load")
                    cells = " | ".join(f"{loop.a_byte(kind):.1f}" for kind in kinds)
                    print(
                        f"| T={stages} {''.join(terms)} {scale} | {tokens} | {weights} | {cells} |"
                        f" {loop.a_byte('integer', 'float'):.1f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
