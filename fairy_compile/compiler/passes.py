"""Passes of our own: dropping unreachable functions, and threads for element-wise loops."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, tirx
from tvm.s_tir import Schedule


def keep_only(entry_points: list[str]) -> Any:
    """Return a pass that drops every function the entry points do not reach."""
    return relax.transform.DeadCodeElimination(entry_points)


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


def _has_attr(func: tirx.PrimFunc, name: str) -> bool:
    return func.attrs is not None and name in func.attrs


def _parallelize(func: tirx.PrimFunc) -> tirx.PrimFunc:
    sch = Schedule(tvm.IRModule({"main": func}))
    try:
        root = sch.get_sblock("root")
        blocks = sch.get_child_blocks(root)
    except (tvm.TVMError, ValueError):
        return func  # not a function of schedulable blocks
    if len(blocks) != 1 or _iterates_over_reductions(sch.get(blocks[0])):
        return func
    loops = sch.get_loops(blocks[0])
    if not loops or not _worth_threads([sch.get(loop).extent for loop in loops]):
        return func
    fused = sch.fuse(*loops) if len(loops) > 1 else loops[0]
    task, _ = sch.split(fused, [None, MIN_ELEMENTS_PER_TASK])
    sch.parallel(task)
    return sch.mod["main"]


def _iterates_over_reductions(block: Any) -> bool:
    return any(int(v.iter_type) != int(tirx.IterVar.DataPar) for v in block.iter_vars)


def _worth_threads(extents: list[Any]) -> bool:
    elements = 1
    for extent in extents:
        if not isinstance(extent, tirx.IntImm):
            return True
        elements *= int(extent)
    return elements > MIN_ELEMENTS_PER_TASK
