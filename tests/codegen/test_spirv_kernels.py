"""Whole kernels on lavapipe: arguments, memory, loops, shared memory, dynamic shapes."""

import numpy as np
import pytest
import tvm
from tvm.script import tirx as T

from tests.emulation import vulkan_runtime
from tests.emulation.vulkan_device import device
from tests.emulation.vulkan_target import build, run

pytestmark = pytest.mark.usefixtures("vulkan")

# The script parser reads annotations as code.


@T.prim_func(s_tir=True)
def scale_by_arguments(
    x: T.Buffer((64,), "float32"),
    y: T.Buffer((64,), "float32"),
    a: T.int32,
    b: T.int64,
    c: T.float32,
):
    for i in T.thread_binding(2, "blockIdx.x"):
        for j in T.thread_binding(32, "threadIdx.x"):
            y[i * 32 + j] = (
                x[i * 32 + j] * c + T.Cast("float32", a) + T.Cast("float32", b - T.int64(2**33))
            )


def test_scalars_as_push_constants():
    vulkan_runtime.install()
    executable, kernels = build(scale_by_arguments)
    assert not next(iter(kernels.values())).uniform_buffer
    x = np.arange(64, dtype="float32")
    y = tvm.runtime.tensor(np.zeros(64, "float32"), device=tvm.vulkan())
    executable(tvm.runtime.tensor(x, device=tvm.vulkan()), y, -7, 2**33 + 5, 1.5)
    np.testing.assert_array_equal(y.numpy(), x * 1.5 - 2)


@pytest.mark.parametrize("count", [16, 17, 40])
def test_many_scalars_as_uniform_buffer(count):
    names = [f"s{i}" for i in range(count)]
    weighted = " + ".join(f"{name} * {i + 1}" for i, name in enumerate(names))
    source = f"""
@T.prim_func(s_tir=True)
def weigh(y: T.Buffer((32,), "int32"), {", ".join(f"{name}: T.int32" for name in names)}):
    for j in T.thread_binding(32, "threadIdx.x"):
        y[j] = {weighted} + j
"""
    function = tvm.script.from_source(source, extra_vars={"T": T})
    vulkan_runtime.install()
    executable, kernels = build(function)
    assert next(iter(kernels.values())).uniform_buffer == (count > 16)
    values = np.random.default_rng(0).integers(-99, 99, count)
    y = tvm.runtime.tensor(np.zeros(32, "int32"), device=tvm.vulkan())
    executable(y, *map(int, values))
    total = (values * np.arange(1, count + 1)).sum()
    np.testing.assert_array_equal(y.numpy(), total + np.arange(32))


@T.prim_func(s_tir=True)
def reverse_rows(a: T.handle, b: T.handle):
    n = T.int32()
    m = T.int64()
    x = T.match_buffer(a, (n, m), "float32")
    y = T.match_buffer(b, (n, m), "float32")
    for i in T.thread_binding(n, "blockIdx.x"):
        for j in T.thread_binding(16, "threadIdx.x"):
            for k in T.serial(T.ceildiv(m, T.int64(16))):
                column = k * T.int64(16) + T.Cast("int64", j)
                if column < m:
                    y[i, column] = x[i, m - T.int64(1) - column]


def test_dynamic_shapes_with_64_bit_indices():
    vulkan_runtime.install()
    executable, _ = build(reverse_rows)
    for shape in ((1, 1), (3, 16), (5, 37)):
        x = np.random.default_rng(0).standard_normal(shape).astype("float32")
        y = tvm.runtime.tensor(np.zeros(shape, "float32"), device=tvm.vulkan())
        executable(tvm.runtime.tensor(x, device=tvm.vulkan()), y)
        np.testing.assert_array_equal(y.numpy(), x[:, ::-1])


@T.prim_func(s_tir=True)
def sum_rows(x: T.Buffer((4, 256), "float32"), y: T.Buffer((4,), "float32")):
    for i in T.thread_binding(4, "blockIdx.x"):
        for j in T.thread_binding(64, "threadIdx.x"):
            partial = T.alloc_buffer((64,), "float32", scope="shared")
            total = T.alloc_buffer((1,), "float32", scope="local")
            total[0] = T.float32(0)
            for k in T.unroll(4):
                total[0] = total[0] + x[i, k * 64 + j]
            partial[j] = total[0]
            T.tvm_storage_sync("shared")
            for step in range(6):
                if j < T.shift_right(32, step):
                    partial[j] = partial[j] + partial[j + T.shift_right(32, step)]
                T.tvm_storage_sync("shared")
            if j == 0:
                y[i] = partial[0]


def test_reduction_through_shared_memory():
    x = np.random.default_rng(0).standard_normal((4, 256)).astype("float32")
    _, y = run(sum_rows, [x, np.zeros(4, "float32")])
    np.testing.assert_allclose(y, x.sum(1), rtol=1e-5, atol=1e-5)


@T.prim_func(s_tir=True)
def cross_thread(x: T.Buffer((8, 128), "float16"), y: T.Buffer((8,), "float32")):
    for i in T.thread_binding(8, "blockIdx.x"):
        for j in T.thread_binding(32, "threadIdx.x"):
            for k in range(4):
                with T.sblock("max"):
                    row = T.axis.spatial(8, i)
                    column = T.axis.reduce(128, k * 32 + j)
                    with T.init():
                        y[row] = T.min_value("float32")
                    y[row] = T.max(y[row], T.Cast("float32", x[row, column]))


def test_reduction_across_threads_that_tvm_lowers():
    x = np.random.default_rng(1).standard_normal((8, 128)).astype("float16")
    _, y = run(cross_thread, [x, np.zeros(8, "float32")])
    np.testing.assert_array_equal(y, x.max(1).astype("float32"))


@T.prim_func(s_tir=True)
def collatz(x: T.Buffer((64,), "int32"), y: T.Buffer((64,), "int32")):
    for j in T.thread_binding(64, "threadIdx.x"):
        state = T.alloc_buffer((2,), "int32", scope="local")
        state[0] = x[j]
        state[1] = 0
        while state[0] > 1:
            if T.truncmod(state[0], 2) == 0:
                state[0] = T.truncdiv(state[0], 2)
            else:
                state[0] = state[0] * 3 + 1
            state[1] = state[1] + 1
        y[j] = state[1]


def test_while_loops_and_branches():
    def steps(n: int) -> int:
        count = 0
        while n > 1:
            n, count = (n // 2 if n % 2 == 0 else 3 * n + 1), count + 1
        return count

    x = np.arange(64, dtype="int32")
    _, y = run(collatz, [x, np.zeros(64, "int32")])
    np.testing.assert_array_equal(y, [steps(n) for n in x])


@T.prim_func(s_tir=True)
def guarded_gather(
    x: T.Buffer((16,), "float32"), index: T.Buffer((64,), "int32"), y: T.Buffer((64,), "float32")
):
    for j in T.thread_binding(64, "threadIdx.x"):
        y[j] = T.if_then_else(
            index[j] >= 0 and index[j] < 16,
            T.if_then_else(index[j] == 3, T.float32(-1), x[index[j]]),
            T.float32(-2),
        )


def test_lazy_choice_does_not_load_out_of_bounds():
    x = np.arange(16, dtype="float32")
    index = np.random.default_rng(2).integers(-(2**31), 2**31 - 1, 64).astype("int32")
    index[:20] = np.arange(20)
    *_, y = run(guarded_gather, [x, index, np.zeros(64, "float32")])
    expected = np.full(64, -2, "float32")
    expected[:16] = x
    expected[3] = -1
    np.testing.assert_array_equal(y, expected)


@T.prim_func(s_tir=True)
def transpose(x: T.Buffer((32, 32), "float32"), y: T.Buffer((32, 32), "float32")):
    for bx in T.thread_binding(2, "blockIdx.x"):
        for by in T.thread_binding(2, "blockIdx.y"):
            for tx in T.thread_binding(16, "threadIdx.x"):
                for ty in T.thread_binding(16, "threadIdx.y"):
                    tile = T.alloc_buffer((16, 17), "float32", scope="shared")
                    tile[ty, tx] = x[by * 16 + ty, bx * 16 + tx]
                    T.tvm_storage_sync("shared")
                    y[bx * 16 + ty, by * 16 + tx] = tile[tx, ty]


def test_blocks_and_threads_of_two_dimensions():
    x = np.random.default_rng(0).standard_normal((32, 32)).astype("float32")
    _, y = run(transpose, [x, np.zeros_like(x)])
    np.testing.assert_array_equal(y, x.T)


@T.prim_func(s_tir=True)
def widen(
    x: T.Buffer((64,), "uint8"), h: T.Buffer((64,), "float16"), y: T.Buffer((64,), "float32")
):
    for j in T.thread_binding(64, "threadIdx.x"):
        y[j] = T.Cast("float32", x[j]) * T.Cast("float32", h[j])


def test_narrow_storage_needs_no_narrow_arithmetic():
    x, h = np.arange(64, dtype="uint8"), np.linspace(-1, 1, 64).astype("float16")
    without = {"supports_int8": None, "supports_int16": None, "supports_float16": None}
    *_, y = run(widen, [x, h, np.zeros(64, "float32")], **without)
    np.testing.assert_array_equal(y, x.astype("float32") * h.astype("float32"))


def test_equal_instructions_are_not_repeated():
    _, kernels = build(transpose)
    (kernel,) = kernels.values()
    assert len(kernel.code) < 2200, "the index arithmetic is shared between load and store"
    assert device().name


@T.prim_func(s_tir=True)
def neighbours(x: T.Buffer((64,), "float32"), y: T.Buffer((16,), "float32")):
    for j in T.thread_binding(16, "threadIdx.x"):
        four = T.alloc_buffer((4,), "float32", scope="local")
        four[T.ramp(0, 1, 4)] = x[T.ramp(j * 4, 1, 4)]
        y[j] = four[0] + four[1] * T.float32(10) + four[2] * T.float32(100) + four[3]


@T.prim_func(s_tir=True)
def strangers(x: T.Buffer((64,), "float32"), y: T.Buffer((16,), "float32")):
    for j in T.thread_binding(15, "threadIdx.x"):
        four = T.alloc_buffer((4,), "float32", scope="local")
        four[T.ramp(0, 1, 4)] = x[T.ramp(j * 4 + 1, 1, 4)]
        y[j] = four[0] + four[1] * T.float32(10) + four[2] * T.float32(100) + four[3]


def test_aligned_neighbours_are_one_load():
    x = np.arange(64, dtype="float32")
    factors = np.array([1, 10, 100, 1], "float32")
    for function, rows, views in ((neighbours, x.reshape(16, 4), 2), (strangers, None, 0)):
        if rows is None:
            rows = np.stack([x[4 * j + 1 : 4 * j + 5] for j in range(15)])
        _, y = run(function, [x, np.zeros(16, "float32")])
        np.testing.assert_array_equal(y[: len(rows)], rows @ factors)
        (kernel,) = build(function)[1].values()
        words = np.frombuffer(kernel.code, "<u4")
        aliased = (words[:-2] == (3 << 16 | 71)) & (words[2:] == 20)
        assert aliased.sum() == views, "the buffer and its view of vectors"
