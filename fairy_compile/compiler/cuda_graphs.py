"""Decode steps as CUDA graphs: launches that were recorded once cost the CPU a single call.

TVM's `RewriteCUDAGraph` finds runs of kernels whose memory and sizes are the same at every call,
and moves each into a function that its runtime records at the first call and replays afterwards.
Attention breaks the runs, since its arguments grow with the text: a decoder of L layers has L + 1
runs a step, and what is before the first attention reads the engine's own buffer, so that its
kernels are launched one by one.

A function with a symbolic number of rows is recorded once for every number it is called with. That
takes memory of one size whatever the number is, so the largest is said beforehand.

Functions whose cache is an argument (`models.page_tables`) have a single run but for the last
kernel, which writes what they return: all their arguments stay where they are. They are recorded
once for every number of rows and of pages in the tables, which callers take from few numbers.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from fairy_compile.artifact.contract import BATCH_DECODE_PAGES, DECODE_PAGES, EXACT_DECODE
from fairy_compile.errors import FairyError
from fairy_compile.targets import Target

DECODE = ("batch_decode", EXACT_DECODE)
_WHOLE = (DECODE_PAGES, BATCH_DECODE_PAGES)
ROWS = "batch_size"
"""Name of the symbolic number of rows of the functions in `DECODE`."""


def bound_decode(most_rows: int) -> Any:
    """Return a pass that lets functions that decode batches be recorded.

    Args:
        most_rows: of a call; memory is planned for as many.
    """

    @tvm.transform.module_pass(opt_level=0, name="BoundDecode")
    def run(module: tvm.IRModule, _: Any) -> tvm.IRModule:
        bounded = tvm.IRModule(dict(module.functions_items()), attrs=module.attrs)
        for var, func in module.functions_items():
            if not isinstance(func, relax.Function):
                continue
            bound = {"tir_var_upper_bound": {ROWS: most_rows}}
            if var.name_hint in DECODE:
                capture = {"relax.rewrite_cuda_graph.capture_symbolic_vars": [ROWS]}
                bounded[var] = func.with_attrs({**bound, **capture})
            elif var.name_hint in _WHOLE:
                # Not one argument is an input that moves; sizes are captured as those of weights.
                bounded[var] = func.with_attrs({**bound, "num_input": 0})
        return bounded

    return run


def open_tuples_late() -> Any:
    """Return a pass that takes weights and pages out of their tuples where they are first used.

    A graph then takes the tuples, a few arguments, and knows what is in them. Taken out before it,
    some hundred tensors would be handed to it at every step, by the CPU and one after the other.
    """

    @tvm.transform.module_pass(opt_level=0, name="OpenTuplesLate")
    def run(module: tvm.IRModule, _: Any) -> tvm.IRModule:
        late = tvm.IRModule(dict(module.functions_items()), attrs=module.attrs)
        for var, func in module.functions_items():
            if isinstance(func, relax.Function) and var.name_hint in _WHOLE:
                late[var] = _open_late(func)
        return late

    return run


def _open_late(func: relax.Function) -> relax.Function:
    params = set(func.params)
    blocks = []
    for block in func.body.blocks:
        waiting, bindings = {}, []
        for binding in block.bindings:
            value = getattr(binding, "value", None)
            if isinstance(value, relax.TupleGetItem) and value.tuple_value in params:
                waiting[binding.var] = binding
                continue
            for used in _variables(value):
                if used in waiting:
                    bindings.append(waiting.pop(used))
            bindings.append(binding)
        blocks.append(relax.BindingBlock([*bindings, *waiting.values()]))
    body = relax.SeqExpr(blocks, func.body.body)
    return relax.Function(func.params, body, func.ret_ty, func.is_pure, func.attrs)


def _variables(value: Any) -> list[Any]:
    """Return the variables of an expression, in order."""
    found: list[Any] = []

    def visit(expr: Any) -> None:
        if isinstance(expr, tvm.ir.Var):
            found.append(expr)

    if value is not None:
        relax.analysis.post_order_visit(value, visit)
    return found


def plan_graphs(
    target: Target, asked: bool | None, most_rows: int, whole: bool, notes: list[str]
) -> int | None:
    """Return the most rows of a decode step that becomes CUDA graphs, or None for no graphs.

    Args:
        target: whose file says ``cuda_graphs = true`` where they are the default.
        asked: what a build asks for; None leaves it to the target.
        most_rows: most sequences of the model.
        whole: whether our runner, which can have the cache as an argument, has steps of one graph.
        notes: what a report says is added here.

    Raises:
        FairyError: graphs were asked for on a target that has none.
    """
    if asked and target.device != "cuda":
        raise FairyError(
            f"--cuda-graphs: target {target.name} runs on {target.device}; allowed for cuda only, "
            "so leave it out"
        )
    wanted = target.extra.get("cuda_graphs", False) if asked is None else asked
    if target.device != "cuda" or not wanted:
        return None
    cut = "attention is between them" + (" in MLC's runtime, not in our runner" if whole else "")
    notes.append(
        f"decode steps are CUDA graphs, for each number of sequences up to {most_rows}; {cut}"
    )
    return most_rows
