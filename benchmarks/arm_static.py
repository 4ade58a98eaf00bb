"""Static estimate of the ARM kernels' decode speed: llvm-mca on their inner loops.

Nothing is executed. llvm-mca simulates LLVM's scheduling model of a core on a loop whose loads all
hit L1; it knows nothing of caches, memory or other cores. Bytes of packed weights per cycle say
how much memory bandwidth one core could make use of; cycles per weight allow for a comparison with
other kernels' loops under the same model.

    python benchmarks/arm_static.py -o benchmarks/results/arm-static.md

Needs llvm-mca (Debian package llvm-22); ``--ggml DIR`` compares with ggml's loops and needs clang
(clang-22).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tvm
import typer

from fairy_compile.kernels.arm import CODEBOOK_KERNELS, ArmCodebook
from fairy_compile.kernels.arm_codegen import codebook
from fairy_compile.kernels.arm_layout import BLOCK, ROWS
from fairy_compile.kernels.x86_tables import blocks_per_step
from fairy_compile.op import ACT_GROUP, PhaseSpec
from fairy_compile.targets import Target

CORES = ("neoverse-n2", "neoverse-v2", "cortex-a55")
TRIPLE = "aarch64-unknown-linux-gnu"
MULTIPLY = {"i8mm": r"smmla", "dotprod": r"sdot", "neon": r"smull2?|smlal2?"}
_ITERATIONS = 1000
_BUDGET = (
    "Vector instructions of the inner loops for 1000 weights. A core with two vector pipes",
    "(neoverse-n2) needs at least half as many cycles, whatever the order of instructions; one",
    "with four (neoverse-v2) a quarter. A kernel's multiplies are fixed by its products: sdot does",
    "16 and smmla 32, and each look-up yields 16 entries. ggml's rows hold their scaling. The last",
    "column has these least cycles as a multiple of those estimated for TQ2_0 on neoverse-n2.",
    "",
    "| kernel | look-ups | multiplies | other | all | cycles on two pipes, at least | loads |"
    " of TQ2_0 |",
    "|---|---|---|---|---|---|---|---|",
)
_ROWS, _COLUMNS = 2048, 2048  # complex; the widths of a LLaMA-2-7B layer


def assembly(kernel: ArmCodebook, spec: PhaseSpec, batch: str = "single", **knobs: object) -> str:
    """Return the assembly of a kernel, compiled for its features and no particular core."""
    features = ("neon", "dotprod", "i8mm") if kernel.isa.name == "i8mm" else kernel.isa.features
    attributes = [f"+{feature}" for feature in features]
    tvm_target = {"kind": "llvm", "mtriple": TRIPLE, "mattr": attributes}
    target = Target("static", "", tvm_target, frozenset(features), ("arm.codebook",))
    function = kernel.build(spec, target, batch, knobs)
    return tvm.compile(function, target=target.to_tvm()).mod.inspect_source("s")


def inner_loops(text: str, opcode: str) -> list[list[str]]:
    """Return the loops of one basic block that have an instruction matching ``opcode``."""
    lines = text.splitlines()
    return [_instructions(lines[i:j]) for i, j in _inner_spans(lines, opcode)]


def around_inner_loops(text: str, opcode: str) -> list[str]:
    """Return the instructions of the smallest loop around all `inner_loops`, without theirs."""
    lines = text.splitlines()
    spans = _inner_spans(lines, opcode)
    first, last = spans[0][0], spans[-1][1]
    around = min(
        ((i, j) for i, j in _loop_spans(lines) if i < first and j > last),
        key=lambda span: span[1] - span[0],
    )
    inside = {at for i, j in spans for at in range(i, j)}
    return _instructions([lines[at] for at in range(*around) if at not in inside])


def _loop_spans(lines: list[str]) -> list[tuple[int, int]]:
    """Return (line of the label, line after the branch) of every backward branch."""
    labels, spans = {}, []
    for at, line in enumerate(lines):
        label = re.match(r"(\.L\w+):", line)
        if label:
            labels[label[1]] = at
        branch = re.match(r"\t(?:b|b\.\w+|cbn?z|tbn?z)\t(?:.*, )?(\.L\w+)", line)
        if branch and branch[1] in labels:
            spans.append((labels[branch[1]], at + 1))
    return spans


def _inner_spans(lines: list[str], opcode: str) -> list[tuple[int, int]]:
    def one_block(i: int, j: int) -> bool:
        return not any(re.match(r"\.L\w+:|\tb\S*\t|\t[ct]bn?z\t", x) for x in lines[i + 1 : j - 1])

    return [
        (i, j)
        for i, j in _loop_spans(lines)
        if one_block(i, j) and count(_instructions(lines[i:j]), opcode)
    ]


def _instructions(lines: list[str]) -> list[str]:
    return [line for line in lines if re.match(r"\t[a-z]", line)]


def count(body: list[str], opcode: str) -> int:
    """Return how many instructions match ``opcode``."""
    return sum(bool(re.match(rf"\t(?:{opcode})\t", line)) for line in body)


def stack_accesses(body: list[str]) -> int:
    """Return how many instructions of a loop touch the stack, that is, spill registers."""
    return sum("[sp" in line for line in body)


def cycles(body: list[str], core: str) -> float:
    """Return llvm-mca's cycles of one iteration, in the steady state of many."""
    command = [
        _tool("llvm-mca-22", "llvm-mca"),
        f"-mtriple={TRIPLE}",
        f"-mcpu={core}",
        "-mattr=+dotprod,+i8mm",
    ]
    command.append(f"-iterations={_ITERATIONS}")
    text = "\n".join(body)
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    found = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    if found is None:
        raise RuntimeError(f"llvm-mca printed no cycles for {core}: {done.stderr}")
    return int(found[1]) / _ITERATIONS


def _tool(*names: str) -> str:
    """Return the first of the programs that is installed."""
    for name in names:
        if shutil.which(name):
            return name
    sys.exit(
        f"{names[0]} is not installed; apt.llvm.org and Debian have it, e.g. llvm-22, clang-22"
    )


@dataclass(frozen=True)
class Estimate:
    """One kernel on one core.

    Attributes:
        kernel: its name, tables and stages.
        core: LLVM's name of the model.
        weight_bytes: bytes of packed weights ...
        weights: ... and real weights that ``cycles`` are for.
        loop_cycles: cycles of the inner loops.
        cycles: the same with the scaling of sums around them.
        spills: instructions of the inner loops that touch the stack.
    """

    kernel: str
    core: str
    weight_bytes: float
    weights: int
    loop_cycles: float
    cycles: float
    spills: int

    def row(self) -> str:
        """Return a row of the report's table."""
        return (
            f"| {self.kernel} | {self.core} | {self.weight_bytes / self.loop_cycles:.2f} | "
            f"{self.weight_bytes / self.cycles:.2f} | {1000 * self.cycles / self.weights:.1f} | "
            f"{self.spills} |"
        )


def _spec(stages: int) -> PhaseSpec:
    return PhaseSpec((_ROWS,), _COLUMNS, stages, ("U", "W"), "tensor", "int8")


def budget_row(
    name: str, loops: list[list[str]], opcode: str, weights: int, peer: float | None
) -> str:
    """Return a table row: vector instructions of loops that take ``weights``, for 1000 of them.

    ``peer`` is the cycles that another kernel takes for 1000 weights on two pipes, if known.
    """
    lines = [line for body in loops for line in body]
    loads = sum(re.match(r"\tld\S*\t(?:[qd]\d|\{)", line) is not None for line in lines)
    vector = sum(re.match(r"\t(?!ld|st)\S+\t.*\bv\d+\.", line) is not None for line in lines)
    lookups, multiplies = count(lines, "tbl"), count(lines, opcode)
    cells = (lookups, multiplies, vector - lookups - multiplies, vector, vector / 2, loads)
    text = [f"{1000 * x / weights:.1f}" for x in cells]
    text.append("-" if peer is None else f"{1000 * vector / 2 / weights / peer:.2f}")
    return f"| {name} | " + " | ".join(text) + " |"


def kernel_budget(kernel: ArmCodebook, stages: int, tables: str, peer: float | None) -> str:
    """Return `budget_row` of a kernel's inner loops."""
    spec, opcode = _spec(stages), MULTIPLY[kernel.isa.name]
    loops = inner_loops(assembly(kernel, spec, tables=tables), opcode)
    weights = 4 * ROWS * BLOCK * blocks_per_step(len(spec.terms), stages)
    return budget_row(f"{kernel.name} {tables}, T={stages}", loops, opcode, weights, peer)


def estimates(kernel: ArmCodebook, stages: int, tables: str) -> Iterator[Estimate]:
    """Estimate decode with U and W and tensor scales."""
    spec = _spec(stages)
    opcode = MULTIPLY[kernel.isa.name]
    text = assembly(kernel, spec, tables=tables)
    loops, around = inner_loops(text, opcode), around_inner_loops(text, opcode)
    book = codebook(spec, kernel.table_mode(spec, {"tables": tables}), kernel.isa.terms)
    # Two rows a look-up; each instruction takes 1, 2 or 4 of them to make two products.
    products = sum(len(book.units[look.unit].products) for look in book.lookups)
    expected = products * ROWS // 2 * kernel.isa.sums_per_quad // 4
    found = sum(count(body, opcode) for body in loops)
    if found != expected:
        raise RuntimeError(f"{kernel.name}: {found} multiplies in its loops, not {expected}")
    blocks = blocks_per_step(len(spec.terms), stages)
    flush_steps = ACT_GROUP // (BLOCK * blocks)
    codes = kernel.layout.arrays(spec)["codes"].shape
    for core in CORES:
        inner = sum(cycles(body, core) for body in loops)
        yield Estimate(
            kernel=f"{kernel.name} {tables}, T={stages}",
            core=core,
            weight_bytes=codes[2] * codes[3],
            weights=4 * ROWS * BLOCK * blocks,  # a widely-linear pair (U, W) is 2 x 2 reals
            loop_cycles=inner,
            cycles=inner + cycles(around, core) / flush_steps,
            spills=sum(stack_accesses(body) for body in loops),
        )


def ggml_loops(ggml: Path) -> Iterator[tuple[str, int, list[str]]]:
    """Yield (name, bytes, loop) of ggml's dot products; an iteration takes 256 weights."""
    flags = ["-O3", "-march=armv8.6-a+dotprod+i8mm+fp16", f"--target={TRIPLE}", "-w"]
    includes = [f"-I{ggml / path}" for path in ("include", "src", "src/ggml-cpu")]
    source = ggml / "src/ggml-cpu/arch/arm/quants.c"
    command = [_tool("clang-22", "clang"), *flags, *includes, "-S", str(source), "-o", "-"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name, function, block_bytes in (
        ("TQ2_0", "ggml_vec_dot_tq2_0_q8_K", 66),
        ("Q2_K", "ggml_vec_dot_q2_K_q8_K", 84),
    ):
        body = re.search(rf"^{function}:.*?^\.Lfunc_end", text, re.DOTALL | re.MULTILINE)
        if body is None:
            raise RuntimeError(f"{source} has no function {function}")
        (loop,) = inner_loops(body[0], MULTIPLY["dotprod"])
        if count(loop, MULTIPLY["dotprod"]) * 16 != 256:
            raise RuntimeError(f"{function}'s loop is not one of a block of 256 weights")
        yield f"ggml {name}, sdot", block_bytes, loop


def ggml_estimates(loops: list[tuple[str, int, list[str]]]) -> Iterator[Estimate]:
    """Estimate `ggml_loops`."""
    for name, block_bytes, loop in loops:
        for core in CORES:
            each = cycles(loop, core)
            yield Estimate(name, core, block_bytes, 256, each, each, stack_accesses(loop))


def main(
    output: Annotated[Path | None, typer.Option("-o", help="Also write the table here.")] = None,
    ggml: Annotated[
        Path | None, typer.Option(help="ggml's sources, to compare with; needs clang.")
    ] = None,
) -> None:
    """Print the estimates as a Markdown table."""
    command = [_tool("llvm-mca-22", "llvm-mca"), "--version"]
    version = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"LLVM version \S+", version)
    lines = [
        "# ARM kernels: static estimates",
        "",
        "**Not measured on hardware.** llvm-mca's cycles of the code that TVM emits for decode",
        "(one row, U and W, tensor scales, 2048 x 2048 complex), all loads in L1. *Inner loops*",
        "look up and multiply; *all* adds the scaling of their sums, once in 128 columns, as if it",
        "did not overlap with them.",
        "Quantisation of activations, outputs and thread launches are in neither. Spills are",
        "instructions of the inner loops that touch the stack. ggml's loops hold their scaling.",
        "",
        f"    python benchmarks/arm_static.py{' --ggml GGML' if ggml else ''}    # "
        f"{found[0] if found else command[0]}",
        "",
        "| kernel | core model | bytes of weights / cycle, inner loops | all |"
        " cycles / 1000 weights, all | spills |",
        "|---|---|---|---|---|---|",
    ]
    modes = [
        (kernel, stages, tables)
        for kernel in CODEBOOK_KERNELS
        for stages in (1, 2)
        for tables in ("combined", "joint", "split")
        if kernel.table_mode(_spec(stages), {"tables": tables}) == tables
    ]
    ours = [estimate for mode in modes for estimate in estimates(*mode)]
    loops = list(ggml_loops(ggml)) if ggml is not None else []
    theirs = list(ggml_estimates(loops))
    lines += [e.row() for e in ours + theirs]
    if theirs:
        lines += ["", "Cycles per weight, as a multiple of ggml's:", ""]
        lines += ["| kernel | core model | of TQ2_0 | of Q2_K |", "|---|---|---|---|"]
        by_core = {core: [e for e in theirs if e.core == core] for core in CORES}
        for e in ours:
            ratios = [e.cycles / e.weights / (g.cycles / g.weights) for g in by_core[e.core]]
            lines.append(f"| {e.kernel} | {e.core} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
    # The first of ggml's kernels on the first core: TQ2_0 on neoverse-n2.
    peer = 1000 * theirs[0].cycles / theirs[0].weights if theirs else None
    lines += ["", *_BUDGET, *(kernel_budget(*mode, peer) for mode in modes)]
    lines += [budget_row(name, [loop], MULTIPLY["dotprod"], 256, peer) for name, _, loop in loops]
    print("\n".join(lines))
    if output is not None:
        output.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    typer.run(main)
