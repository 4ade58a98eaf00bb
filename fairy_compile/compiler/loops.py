"""Schedules for the CPU loops of imported graphs: convolutions, softmax, products of activations.

Kernels of our own come with their schedules. What a graph brings besides is lowered by TVM to
plain serial loops; here every such loop nest gets threads, and an inner loop that LLVM turns into
vectors. It is a rule, not a tuner: right for any shape, good for common ones.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.s_tir import Schedule

from fairy_compile.compiler.passes import iterates_over_reductions

# Partial sums of a reduction along rows.
LANES = 16
# Columns of other products that are summed together, in the nearest cache.
COLUMNS = 64
# Outputs of a product that are summed in registers, where they divide its shape.
TILE_ROWS, TILE_LANES = (4, 2, 1), (32, 16, 8)
# A nest of fewer steps is not worth waking a thread for.
MIN_STEPS = 1 << 14

_SPATIAL = int(tirx.IterVar.DataPar)


@tvm.transform.module_pass(opt_level=0, name="ScheduleLoops")
class ScheduleLoops:
    """Schedule the functions that reduce or have several stages; others are left to later passes.

    A stage whose form is not understood stays serial, which is slow and right.
    """

    def transform_module(self, module: tvm.IRModule, _: Any) -> tvm.IRModule:
        """Apply the rule to every PrimFunc of the module that has no schedule yet."""
        updated = tvm.IRModule(dict(module.functions_items()), attrs=module.attrs)
        for var, func in module.functions_items():
            scheduled = func.attrs is not None and "tirx.is_scheduled" in func.attrs
            if isinstance(func, tirx.PrimFunc) and not scheduled:
                updated[var] = _schedule(func)
        return updated


def _schedule(func: tirx.PrimFunc) -> tirx.PrimFunc:
    sch = Schedule(tvm.IRModule({"main": func}))
    try:
        blocks = sch.get_child_blocks(sch.get_sblock("root"))
    except (RuntimeError, ValueError):
        return func  # not a function of schedulable blocks
    names = [sch.get(block).name_hint for block in blocks]
    if len(blocks) == 1 and not iterates_over_reductions(sch.get(blocks[0])):
        return func
    for name in names:
        attempt = sch.copy()
        try:
            _schedule_stage(attempt, name)
        except (RuntimeError, ValueError):
            continue
        sch = attempt
    return sch.mod["main"].with_attr("tirx.is_scheduled", True)


def _schedule_stage(sch: Schedule, name: str) -> None:
    block = sch.get_sblock(name)
    loops, node = sch.get_loops(block), sch.get(block)
    kinds = [int(v.iter_type) for v in node.iter_vars]
    if len(kinds) != len(loops):
        return
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == _SPATIAL]
    sums = [loop for loop, kind in zip(loops, kinds, strict=True) if kind != _SPATIAL]
    if not spatial:
        return
    threads = _worth_threads([sch.get(loop).extent for loop in loops])
    if not sums:
        _in_parallel(sch, spatial[:-1] or spatial, threads)
    elif _reads_along(node):
        # Products and convolutions: neighbouring outputs are the lanes.
        *lead, last = spatial
        extents = [_constant(sch.get(loop).extent) for loop in spatial]
        lanes = next((n for n in TILE_LANES if extents[-1] % n == 0), 0)
        if lanes and lead:
            rows = next(n for n in TILE_ROWS if extents[-2] % n == 0)
            _sum_in_registers(sch, block, spatial, sums, (rows, lanes), threads)
            return
        columns, lanes = sch.split(last, [None, COLUMNS])
        sch.reorder(*lead, columns, *sums, lanes)
        _in_parallel(sch, [*lead, columns], threads)
        sch.decompose_reduction(block, sums[0])
    elif _constant(sch.get(sums[-1]).extent) % LANES == 0:
        _sum_in_lanes(sch, block, spatial, sums[-1], threads)
    else:
        _in_parallel(sch, spatial, threads)


def _sum_in_registers(
    sch: Schedule,
    block: Any,
    spatial: list[Any],
    sums: list[Any],
    tile: tuple[int, int],
    threads: bool,
) -> None:
    """Sum a tile of outputs at a time, so that sums stay in registers and inputs are reused."""
    result = sch.cache_write(block, 0, "global")  # a local scope would be a call on CPUs
    *lead, row, column = spatial
    rows, row = sch.split(row, [None, tile[0]])
    columns, lane = sch.split(column, [None, tile[1]])
    sch.reorder(*lead, rows, columns, *sums, row, lane)
    sch.reverse_compute_at(result, columns)
    # A block whose start is split off is no reduction any more, so that comes last.
    _in_parallel(sch, [*lead, rows, columns], threads)
    for own in (block, result):
        _as_vectors(sch, own, tile[0])
    _as_vectors(sch, sch.decompose_reduction(block, sums[0]), tile[0])


def _as_vectors(sch: Schedule, block: Any, rows: int) -> None:
    *_, row, lane = sch.get_loops(block)
    sch.vectorize(lane)
    if rows > 1:
        sch.unroll(row)


def _sum_in_lanes(sch: Schedule, block: Any, spatial: list[Any], loop: Any, threads: bool) -> None:
    """Sum along rows in `LANES` partial sums; floats may not be reordered by LLVM itself."""
    _, lane = sch.split(loop, [None, LANES])
    partial = sch.rfactor(lane, factor_axis=len(spatial))
    sch.compute_at(partial, sch.get_loops(block)[len(spatial) - 1], preserve_unit_loops=True)
    inner = sch.get_loops(partial)[len(spatial) :]
    kinds = [int(v.iter_type) for v in sch.get(partial).iter_vars][-len(inner) :]
    lanes = [own for own, kind in zip(inner, kinds, strict=True) if kind == _SPATIAL]
    sums = [own for own, kind in zip(inner, kinds, strict=True) if kind != _SPATIAL]
    sch.reorder(*sums, *lanes)
    _in_parallel(sch, sch.get_loops(block)[: len(spatial)], threads)
    sch.vectorize(lanes[-1])
    init = sch.decompose_reduction(partial, sums[0])
    sch.vectorize(sch.get_loops(init)[-1])


def _in_parallel(sch: Schedule, loops: list[Any], threads: bool) -> None:
    if threads:
        sch.parallel(sch.fuse(*loops) if len(loops) > 1 else loops[0])


def _reads_along(node: Any) -> bool:
    """Tell whether a stage reads neighbouring elements along its last output dimension."""
    last = [v.var for v in node.iter_vars if int(v.iter_type) == _SPATIAL][-1]
    regions = [read.region for read in node.reads if read.region]
    return any(_mentions(region[-1].min, last) for region in regions)


def _mentions(expr: Any, var: Any) -> bool:
    found: list[bool] = []

    def visit(node: Any, visitor: Any) -> None:
        found.append(node.same_as(var))

    tvm_ffi.structural_visit(expr, [(tirx.Var, visit)])
    return any(found)


def _constant(extent: Any) -> int:
    """Return a loop's extent, or 1 where it is known only at run time."""
    return int(extent) if isinstance(extent, int | tirx.IntImm) else 1


def _worth_threads(extents: list[Any]) -> bool:
    steps = 1
    for extent in extents:
        if not isinstance(extent, int | tirx.IntImm):
            return True
        steps *= int(extent)
    return steps >= MIN_STEPS
