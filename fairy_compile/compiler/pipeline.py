"""The compilation pipeline: one list of named phases from a Relax module to a library.

Read top to bottom, this is everything that happens to a model's IR. `--debug-dump DIR` writes the
module after each phase.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
from tvm import relax
from tvm_ffi import register_error

from fairy_compile.compiler.cuda_binary import machine_code
from fairy_compile.compiler.cuda_graphs import bound_decode, open_tuples_late
from fairy_compile.compiler.device_pipeline import pass_context, tir_pipeline
from fairy_compile.compiler.empty_constants import AllocateEmptyConstants
from fairy_compile.compiler.fuse_norms import FuseAddNorm
from fairy_compile.compiler.loops import ScheduleLoops
from fairy_compile.compiler.passes import (
    BindElementwise,
    CheckBound,
    ParallelizeElementwise,
    keep_only,
)
from fairy_compile.compiler.quantize_once import QuantizeOnce
from fairy_compile.compiler.system_lib import prefix_symbols
from fairy_compile.targets import Target

# Ctrl-C while TVM calls our passes would come out of it as a RuntimeError without a message.
register_error(KeyboardInterrupt)

Progress = Callable[[str, int, int], None]
"""Called as progress(what, done, total)."""


@dataclass(frozen=True)
class Phase:
    """A named group of passes."""

    name: str
    passes: tuple[Any, ...]


def phases(
    entry_points: list[str],
    target: Target,
    symbol_prefix: str | None = None,
    graph: bool = False,
    cuda_graphs: int | None = None,
) -> list[Phase]:
    """Return the phases in order.

    Args:
        entry_points: the functions an engine may call.
        target: what to compile for.
        symbol_prefix: of a system library, see `artifact.system_lib`; None for a shared one.
        graph: the module was imported and has operators that reduce and have no schedule of ours.
        cuda_graphs: most rows of a decode step whose launches become CUDA graphs, see
            `compiler.cuda_graphs`; None for none.
    """
    t = relax.transform
    legalise: tuple[Any, ...] = (t.LegalizeOps(), t.AnnotateTIROpPattern(), t.FoldConstant())
    schedule: tuple[Any, ...] = (ParallelizeElementwise(),)
    if graph:
        schedule = (ScheduleLoops(), *schedule)
    if target.device == "cuda":
        legalise = (FuseAddNorm(), QuantizeOnce(), *legalise)
    if target.limits:
        # Reshapes become views before fusion makes copies of them: a launch costs more than a copy.
        legalise = (*legalise, t.RewriteDataflowReshape())
        schedule = (BindElementwise(target.limits.max_threads), CheckBound())
    before_planning, after_planning = (), (AllocateEmptyConstants(),) if graph else ()
    if cuda_graphs is not None:
        before_planning = (bound_decode(cuda_graphs),)
        after_planning = (open_tuples_late(), t.RewriteCUDAGraph())
    return [
        Phase("legalise operators", legalise),
        Phase("fuse element-wise", (t.FuseOps(), t.FuseTIR(), keep_only(entry_points))),
        Phase("schedule element-wise", schedule),
        Phase(
            "plan memory",
            (
                *before_planning,
                t.RewriteDataflowReshape(),
                t.ToNonDataflow(),
                t.RemovePurityChecking(),
                t.CallTIRRewrite(),
                t.StaticPlanBlockMemory(),
                *after_planning,
            ),
        ),
        Phase(
            "lower to the VM",
            (
                t.LowerAllocTensor(),
                t.KillAfterLastUse(),
                t.LowerRuntimeBuiltin(),
                t.VMShapeLower(),
                t.AttachGlobalSymbol(),
                *([prefix_symbols(symbol_prefix)] if symbol_prefix else []),
            ),
        ),
    ]


def compile_module(
    module: tvm.IRModule,
    target: Target,
    entry_points: list[str],
    *,
    graph: bool = False,
    symbol_prefix: str | None = None,
    cuda_graphs: int | None = None,
    debug_dump: Path | None = None,
    progress: Progress | None = None,
) -> Any:
    """Run all phases and generate code.

    Args:
        module: Relax module with kernels as PrimFuncs.
        target: what to compile for.
        entry_points: names an engine calls; everything they do not reach is dropped.
        graph: see `phases`.
        symbol_prefix: of a system library, see `artifact.system_lib`; None for a shared one.
        cuda_graphs: see `phases`.
        debug_dump: directory for one ``NN-phase.py`` per phase, or None.
        progress: called before each phase.

    Returns:
        The Relax VM executable.
    """
    steps = phases(entry_points, target, symbol_prefix, graph, cuda_graphs)
    tvm_target = target.to_tvm()
    options = {"relax.backend.use_cuda_graph": cuda_graphs is not None}
    with tvm_target, pass_context(target, own_kernels=not graph, config=options):
        _dump(debug_dump, 0, "input", module)
        for i, phase in enumerate(steps):
            if progress:
                progress(phase.name, i, len(steps) + 1)
            module = tvm.transform.Sequential(list(phase.passes))(module)
            _dump(debug_dump, i + 1, phase.name, module)
        if progress:
            progress("generate code", len(steps), len(steps) + 1)
        nothing_left = tvm.transform.Sequential([])
        with machine_code(target) if target.device == "cuda" else nullcontext():
            return relax.build(
                module,
                target=tvm_target,
                relax_pipeline=nothing_left,
                tir_pipeline=tir_pipeline(target),
                system_lib=symbol_prefix is not None or None,
            )


def _dump(directory: Path | None, index: int, name: str, module: tvm.IRModule) -> None:
    if directory is None:
        return
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"{index:02d}-{name.replace(' ', '-')}.py"
    file.write_text(module.script(), "utf-8")
