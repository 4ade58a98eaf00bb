"""Schedules of the loops that imported graphs bring: right for every shape, and applied."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import tvm
from tvm import relax, tirx
from tvm.s_tir import Schedule

from fairy_compile.compiler import loops
from fairy_compile.targets import load_target


def function_of(build: Any, shapes: list[tuple]) -> tirx.PrimFunc:
    """Lower one operator as the pipeline does; a text in a shape is a dimension's name."""
    names = {d: tirx.Var(d, "int64") for shape in shapes for d in shape if isinstance(d, str)}
    variables = [
        relax.Var(f"v{i}", relax.TensorType([names.get(d, d) for d in shape], "float32"))
        for i, shape in enumerate(shapes)
    ]
    bb = relax.BlockBuilder()
    with bb.function("main", variables):
        bb.emit_func_output(bb.emit(build(*variables)))
    t = relax.transform
    with load_target("cpu").to_tvm():
        passes = [t.LegalizeOps(), t.AnnotateTIROpPattern(), t.FuseOps(), t.FuseTIR()]
        module = tvm.transform.Sequential(passes)(bb.get())
    (func,) = (f for f in module.functions.values() if isinstance(f, tirx.PrimFunc))
    return func


def run(func: tirx.PrimFunc, arrays: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    out = tvm.runtime.tensor(np.full(shape, np.nan, np.float32))
    compiled = tvm.compile(module, target=load_target("cpu").to_tvm())
    compiled["main"](*map(tvm.runtime.tensor, arrays), out)
    return out.numpy()


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def conv(stride: int = 1, padding: int = 0):
    def reference(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        tensors = (torch.tensor(x), torch.tensor(w))
        return torch.nn.functional.conv2d(*tensors, stride=stride, padding=padding).numpy()

    return lambda x, w: relax.op.nn.conv2d(x, w, strides=stride, padding=padding), reference


def softmax(x: np.ndarray) -> np.ndarray:
    return torch.softmax(torch.tensor(x), -1).numpy()


MATMUL = (relax.op.matmul, np.matmul)
SOFTMAX = (lambda x: relax.op.nn.softmax(x, axis=-1), softmax)
CASES = {
    "product": (*MATMUL, [(2, 3, 16, 24), (2, 3, 24, 64)]),
    "odd product": (*MATMUL, [(6, 10), (10, 7)]),
    "one row": (*MATMUL, [(1, 64), (64, 32)]),
    "convolution": (*conv(stride=2, padding=1), [(1, 8, 32, 32), (16, 8, 3, 3)]),
    "odd convolution": (*conv(padding=1), [(1, 3, 15, 15), (5, 3, 3, 3)]),
    "softmax": (*SOFTMAX, [(4, 32, 64)]),
    "odd softmax": (*SOFTMAX, [(7, 33)]),
    "mean over rows": (lambda x: relax.op.mean(x, axis=[1]), lambda x: x.mean(1), [(4, 48, 20)]),
    "mean of rows": (lambda x: relax.op.mean(x, axis=[2]), lambda x: x.mean(2), [(64, 16, 32)]),
    "mean of all": (lambda x: relax.op.mean(x), lambda x: x.mean(), [(8, 32)]),
    "largest": (lambda x: relax.op.max(x, axis=[-1]), lambda x: x.max(-1), [(64, 16, 48)]),
}


@pytest.mark.parametrize("name", CASES)
def test_scheduled_loops_compute_the_same(name: str) -> None:
    build, reference, shapes = CASES[name]
    arrays = [random(*shape) for shape in shapes]
    want = np.asarray(reference(*arrays))
    got = run(loops._schedule(function_of(build, shapes)), arrays, want.shape)
    # Sums of at most 100 products or numbers of size 1, in another order.
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=100 * 2.0**-23)


@pytest.mark.parametrize("name", [name for name in CASES if name != "mean of all"])
def test_every_stage_is_understood(name: str) -> None:
    """What fails here would stay serial without a word."""
    build, _, shapes = CASES[name]
    sch = Schedule(tvm.IRModule({"main": function_of(build, shapes)}))
    stages = [sch.get(b).name_hint for b in sch.get_child_blocks(sch.get_sblock("root"))]
    for stage in stages:
        loops._schedule_stage(sch, stage)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 7), (32, 64)])
def test_products_of_unknown_sizes(rows: int, columns: int) -> None:
    func = loops._schedule(function_of(relax.op.matmul, [("n", 16), (16, "m")]))
    a, b = random(rows, 16), random(16, columns)
    np.testing.assert_allclose(run(func, [a, b], (rows, columns)), a @ b, rtol=1e-5, atol=1e-5)


def test_products_are_summed_in_registers_by_several_threads() -> None:
    text = loops._schedule(function_of(relax.op.matmul, [(64, 64), (64, 64)])).script()
    assert "T.parallel" in text
    assert "T.vectorized" in text
    assert "T.unroll" in text


def test_small_work_wakes_no_threads() -> None:
    text = loops._schedule(function_of(relax.op.matmul, [(4, 8), (8, 8)])).script()
    assert "T.parallel" not in text
