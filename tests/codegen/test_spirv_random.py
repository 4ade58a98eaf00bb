"""Random expressions and random schedules: lavapipe agrees with llvm bit by bit."""

from __future__ import annotations

import itertools
from functools import cache
from random import Random
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tvm import s_tir, te, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from tests.emulation.vulkan_compare import run_vulkan
from tests.emulation.vulkan_device import device
from tests.emulation.vulkan_module import bound_buffers
from tests.emulation.vulkan_random import TYPES, RandomExpressions, random_inputs
from tests.emulation.vulkan_target import HOST, build, run

pytestmark = pytest.mark.usefixtures("vulkan")

LENGTH = 64
EXPRESSIONS = 20  # of a kernel; with the inputs 30 buffers, of 32 that lavapipe has
DEPTH = 4


@cache
def compared_types() -> list[str]:
    """Return the types whose comparisons this machine's driver gets right.

    Mesa 22.3.6's lavapipe takes 0 < int64(x) for true whatever the int32 x, if the zero is a
    constant or its compiler makes it one. The same SPIR-V written by hand shows it too:
    ``OpSConvert %long``, ``OpSLessThan %bool %long_0 %wide``, ``OpSelect``.
    """
    wide = np.arange(LENGTH, dtype="int64")
    narrow = np.resize(np.array([0, 6, -1, 4], "int32"), LENGTH)

    def body(x: Any, y: Any) -> Any:
        zero = tirx.bitwise_xor(x, x)
        return tirx.Cast("int32", zero < tirx.Cast("int64", y))

    (seen,) = run_vulkan(body, [wide, narrow])
    return [t for t in TYPES if t != "int64" or np.array_equal(seen, narrow > 0)]


def random_kernel(random: Random, count: int, threads: bool):
    """Return a function of one input of each type and ``count`` results."""
    dtypes = [random.choice(TYPES) for _ in range(count)]
    with IRBuilder() as ir, T.prim_func(s_tir=True):
        T.func_name("main")
        inputs = {dtype: T.arg(dtype, T.buffer((LENGTH,), dtype)) for dtype in TYPES}
        outputs = [T.arg(f"out{i}", T.buffer((LENGTH,), d)) for i, d in enumerate(dtypes)]
        loop = T.thread_binding(LENGTH, thread="threadIdx.x") if threads else T.serial(0, LENGTH)
        with loop as i:
            inside = {d: b[i] for d, b in inputs.items()}
            draw = RandomExpressions(random, inside, compared_types())
            for output, dtype in zip(outputs, dtypes, strict=True):
                T.buffer_store(output, draw.draw(dtype, DEPTH).node, [i])
    return ir.get(), dtypes


# Its folding of constants refuses unsigned differences that come out negative, and shifts that come
# out too wide, even in branches that never run.
FOLDING = (
    "make uint from negative value",
    "will cause a negative uint",
    "Shift amount must be non-negative",
)


def compile_or_none(compiler: Any, function: Any, *arguments: Any) -> Any:
    """Return what ``compiler`` makes of a function, or None if TVM itself cannot lower it."""
    try:
        return compiler(function, *arguments)
    except tvm.error.InternalError as error:
        if not any(message in str(error) for message in FOLDING):
            raise
        return None


def check_random_kernel(seed: int) -> bool:
    """Compare one kernel; return False if TVM itself cannot lower it.

    Seeds 0 to 326 agreed on Mesa 22.3.6: 321 kernels, 6420 expressions, but for one of seed 52,
    whose cause (the narrowing that `RandomExpressions` tells of) later draws avoid.
    """
    inputs = random_inputs(seed, LENGTH)
    function, dtypes = random_kernel(Random(seed), EXPRESSIONS, threads=False)
    expected = [tvm.runtime.tensor(np.zeros(LENGTH, dtype)) for dtype in dtypes]
    host = compile_or_none(lambda f: tvm.compile(f, target=HOST), function)
    function, _ = random_kernel(Random(seed), EXPRESSIONS, threads=True)
    built = compile_or_none(build, function)
    if host is None or built is None:
        return False
    host(*map(tvm.runtime.tensor, inputs.values()), *expected)
    # Without the host's code, whose compilation takes longer than all else.
    (kernel,) = built[1].values()
    arrays = inputs | {f"out{i}": np.zeros(LENGTH, dtype) for i, dtype in enumerate(dtypes)}
    bound = bound_buffers(kernel.code)
    device().run(
        kernel, [arrays[bound[i][0].removesuffix("_ptr")] for i in range(len(bound))], (1, 1, 1)
    )
    for i, (dtype, e) in enumerate(zip(dtypes, expected, strict=True)):
        s = arrays[f"out{i}"]
        if not np.array_equal(s, e.numpy()):
            raise AssertionError(f"seed {seed}, out{i} of {dtype}: {s} is not {e}\n{function}")
    device().forget_pipelines()
    return True


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_random_expressions(seed):
    check_random_kernel(seed)


@pytest.mark.slow
def test_ten_thousand_random_expressions():
    seeds, compared = itertools.count(), 0
    while compared < 10_000 // EXPRESSIONS:
        compared += check_random_kernel(next(seeds))


# ---------------------------------------------------------------------- schedules


def matrix_product(rows: int, columns: int, depth: int, dtype: str):
    """Return C = A B of small integers, accumulated in ``dtype``."""
    a = te.placeholder((rows, depth), "int8", name="a")
    b = te.placeholder((depth, columns), "int8", name="b")
    k = te.reduce_axis((0, depth), name="k")
    c = te.compute(
        (rows, columns),
        lambda i, j: te.sum(tirx.Cast(dtype, a[i, k]) * tirx.Cast(dtype, b[k, j]), axis=k),
        name="c",
    )
    return te.create_prim_func([a, b, c])


def random_schedule(random: Random, function):
    """Tile, bind, stage through shared and local memory, vectorise and unroll at random."""
    schedule = s_tir.Schedule(function)
    block = schedule.get_sblock("c")
    i, j, k = schedule.get_loops(block)
    tile_i, tile_j, tile_k = (random.choice([1, 2, 4]) for _ in range(3))
    threads_i, threads_j = random.choice([1, 2, 4]), random.choice([2, 4, 8])
    bi, ti, ri = schedule.split(i, [None, threads_i, tile_i])
    bj, tj, rj = schedule.split(j, [None, threads_j, tile_j])
    ko, ki = schedule.split(k, [None, tile_k])
    order = [ko, ki, ri, rj] if random.random() < 0.5 else [ko, ri, ki, rj]
    schedule.reorder(bi, bj, ti, tj, *order)
    schedule.bind(bi, "blockIdx.y")
    schedule.bind(bj, "blockIdx.x")
    staged = random.random() < 0.7
    if staged:
        # One axis of threads: with two, TVM's ThreadSync takes a store that only threads with y = 0
        # do for one of the reader's own, and leaves out the barrier.
        tj = schedule.fuse(ti, tj)
    else:
        schedule.bind(ti, "threadIdx.y")
    schedule.bind(tj, "threadIdx.x")
    if random.random() < 0.7:
        schedule.reverse_compute_at(schedule.cache_write(block, 0, "local"), tj)
    for operand in (0, 1):
        if staged and random.random() < 0.7:
            copy = schedule.cache_read(block, operand, "shared")
            schedule.compute_at(copy, ko, preserve_unit_loops=True)
            fused = schedule.fuse(*schedule.get_loops(copy)[-2:])
            _, thread = schedule.split(fused, [None, threads_i * threads_j])
            schedule.bind(thread, "threadIdx.x")
    if random.random() < 0.5:
        schedule.unroll(ki)
    if tile_j > 1 and random.random() < 0.6:
        schedule.vectorize(rj)
    if random.random() < 0.5:
        schedule.decompose_reduction(block, ko)
    return schedule.mod["main"]


def check_random_schedule(seed: int) -> None:
    random = Random(seed)
    rows, columns, depth = random.randint(1, 40), random.randint(1, 70), random.randint(1, 50)
    dtype = random.choice(["int32", "float32", "int16", "int64", "float16"])
    rng = np.random.default_rng(seed)
    limit = 3 if dtype == "float16" else 127  # sums stay exact
    a = rng.integers(-limit, limit, (rows, depth)).astype("int8")
    b = rng.integers(-limit, limit, (depth, columns)).astype("int8")
    function = random_schedule(random, matrix_product(rows, columns, depth, dtype))
    *_, seen = run(function, [a, b, np.zeros((rows, columns), dtype)])
    expected = (a.astype("int64") @ b.astype("int64")).astype(dtype)
    np.testing.assert_array_equal(seen, expected, err_msg=f"seed {seed}\n{function}")
    device().forget_pipelines()


@pytest.mark.parametrize("seed", range(4))
def test_random_schedules(seed):
    check_random_schedule(seed)


@pytest.mark.slow
def test_two_hundred_random_schedules():
    """All agreed on Mesa 22.3.6, with storage buffers read by vectors."""
    for seed in range(200):
        check_random_schedule(1000 + seed)
