"""Passes of our own: dropping unreachable functions, and threads for element-wise loops.

Everything that reduces is written with its schedule; what Relax's fusion leaves are element-wise
functions, which these passes spread over the threads of a CPU or of a GPU.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.s_tir import Schedule


def keep_only(entry_points: list[str]) -> Any:
    """Return a pass that drops every function the entry points do not reach."""

    @tvm.transform.module_pass(opt_level=0, name="KeepOnly")
    def run(module: tvm.IRModule, _: Any) -> tvm.IRModule:
        # Functions with a symbol of their own count as reachable from outside.
        private = {
            var: func.without_attr("global_symbol")
            if isinstance(func, tirx.PrimFunc) and var.name_hint not in entry_points
            else func
            for var, func in module.functions_items()
        }
        module = tvm.IRModule(private, attrs=module.attrs)
        return relax.transform.DeadCodeElimination(entry_points)(module)

    return run


# A task this small is not worth handing to another thread: waking one costs about as much as
# computing this many elements.
MIN_ELEMENTS_PER_TASK = 4096


@tvm.transform.module_pass(opt_level=0, name="ParallelizeElementwise")
class ParallelizeElementwise:
    """Split the loops of fused element-wise functions over threads where there is work for them.

    Functions that carry ``tirx.is_scheduled`` or were never made of one spatial block are left
    as they are. Only loops with a symbolic extent or more than `MIN_ELEMENTS_PER_TASK` elements
    are touched.
    """

    def transform_module(self, module: tvm.IRModule, _: Any) -> tvm.IRModule:
        """Apply the rule to every PrimFunc of the module."""
        updated = tvm.IRModule(dict(module.functions_items()), attrs=module.attrs)
        for var, func in module.functions_items():
            if isinstance(func, tirx.PrimFunc) and not _has_attr(func, "tirx.is_scheduled"):
                updated[var] = _parallelize(func)
        return updated


@tvm.transform.module_pass(opt_level=0, name="BindElementwise")
class BindElementwise:
    """Give every function that is not scheduled yet to the threads of a GPU, an element each.

    Stages before the last are computed where they are used.

    Raises:
        RuntimeError: a function reduces or has several outputs; it needs a schedule of its own.
    """

    def __init__(self, max_threads: int) -> None:
        self.threads = min(256, max_threads)

    def transform_module(self, module: tvm.IRModule, _: Any) -> tvm.IRModule:
        """Apply the rule to every PrimFunc of the module."""
        updated = tvm.IRModule(dict(module.functions_items()), attrs=module.attrs)
        for var, func in module.functions_items():
            if isinstance(func, tirx.PrimFunc) and not _has_attr(func, "tirx.is_scheduled"):
                updated[var] = self._bind(func, var.name_hint)
        return updated

    def _bind(self, func: tirx.PrimFunc, name: str) -> tirx.PrimFunc:
        sch = Schedule(tvm.IRModule({"main": func}))
        *inner, last = sch.get_child_blocks(sch.get_sblock("root"))
        if any(iterates_over_reductions(sch.get(block)) for block in (*inner, last)):
            raise RuntimeError(f"function {name} reduces, and has no schedule for a GPU")
        loops = sch.get_loops(last)
        for block in inner:
            if _same_loops(sch, sch.get_loops(block), loops):
                continue  # side by side, as keys and values go into a cache
            try:
                sch.compute_inline(block)
            except tvm.s_tir.ScheduleError as error:
                raise RuntimeError(f"function {name} has no schedule for a GPU") from error
        loops = sch.get_loops(last)
        if not loops:
            loops = [sch.add_unit_loop(last)]
        fused = sch.fuse(*loops) if len(loops) > 1 else loops[0]
        block_index, thread = sch.split(fused, [None, self.threads])
        sch.bind(block_index, "blockIdx.x")
        sch.bind(thread, "threadIdx.x")
        return sch.mod["main"].with_attr("tirx.is_scheduled", True)


@tvm.transform.module_pass(opt_level=0, name="CheckBound")
class CheckBound:
    """Raise RuntimeError if a function would run on the host, reading memory of the device."""

    def transform_module(self, module: tvm.IRModule, _: Any) -> tvm.IRModule:
        """Look at every PrimFunc of the module and return it as it is."""
        for var, func in module.functions_items():
            if isinstance(func, tirx.PrimFunc) and not _is_bound(func):
                raise RuntimeError(f"function {var.name_hint} is bound to no threads of the GPU")
        return module


def _same_loops(sch: Schedule, ours: list[Any], theirs: list[Any]) -> bool:
    return len(ours) == len(theirs) and all(
        sch.get(a).same_as(sch.get(b)) for a, b in zip(ours, theirs, strict=True)
    )


def _is_bound(func: tirx.PrimFunc) -> bool:
    bound: list[tirx.For] = []

    def visit(loop: tirx.For, visitor: Any) -> None:
        if loop.thread_binding is not None:
            bound.append(loop)
        else:
            visitor.default_visit(loop)

    tvm_ffi.structural_visit(func.body, [(tirx.For, visit)])
    return bool(bound)


def _has_attr(func: tirx.PrimFunc, name: str) -> bool:
    return func.attrs is not None and name in func.attrs


def _parallelize(func: tirx.PrimFunc) -> tirx.PrimFunc:
    sch = Schedule(tvm.IRModule({"main": func}))
    try:
        root = sch.get_sblock("root")
        blocks = sch.get_child_blocks(root)
    except (RuntimeError, ValueError):
        return func  # not a function of schedulable blocks
    if len(blocks) != 1 or iterates_over_reductions(sch.get(blocks[0])):
        return func
    loops = sch.get_loops(blocks[0])
    if not loops or not _worth_threads([sch.get(loop).extent for loop in loops]):
        return func
    fused = sch.fuse(*loops) if len(loops) > 1 else loops[0]
    task, _ = sch.split(fused, [None, MIN_ELEMENTS_PER_TASK])
    sch.parallel(task)
    return sch.mod["main"]


def is_op(value: Any, name: str) -> bool:
    """Tell whether a Relax expression calls the operator ``name``."""
    return isinstance(value, relax.Call) and getattr(value.op, "name", "") == name


def iterates_over_reductions(block: Any) -> bool:
    """Tell whether a block has loops that sum up, or others that are not independent."""
    return any(int(v.iter_type) != int(tirx.IterVar.DataPar) for v in block.iter_vars)


def _worth_threads(extents: list[Any]) -> bool:
    elements = 1
    for extent in extents:
        if not isinstance(extent, tirx.IntImm):
            return True
        elements *= int(extent)
    return elements > MIN_ELEMENTS_PER_TASK
