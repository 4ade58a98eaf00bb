"""Subgroup operations and integer dot products, where the target has them."""

import numpy as np
import pytest
import tvm
from tvm import tirx
from tvm.script import tirx as T

from fairy_compile.codegen import spirv
from fairy_compile.errors import UnsupportedError
from tests.emulation.vulkan_compare import run_vulkan
from tests.emulation.vulkan_target import SUBGROUPS, run, vulkan_target

pytestmark = pytest.mark.usefixtures("vulkan")


@T.prim_func(s_tir=True)
def group(x: T.Buffer((64,), "float32"), y: T.Buffer((6, 64), "float32")):
    for j in T.thread_binding(64, "threadIdx.x"):
        y[0, j] = T.call_pure_extern("float32", "subgroupAdd", x[j])
        y[1, j] = T.call_pure_extern("float32", "subgroupMax", x[j])
        y[2, j] = T.call_pure_extern("float32", "subgroupBroadcast", x[j], 3)
        y[3, j] = T.call_pure_extern("float32", "subgroupShuffleXor", x[j], 1)
        y[4, j] = T.tvm_warp_shuffle(T.uint32(0), x[j], T.bitwise_xor(T.bitwise_and(j, 7), 2), 8, 8)
        y[5, j] = T.Cast("float32", T.call_pure_extern("uint32", "gl_SubgroupSize"))


def test_subgroups():
    x = np.random.default_rng(0).standard_normal(64).astype("float32")
    _, y = run(group, [x, np.zeros((6, 64), "float32")], **SUBGROUPS)
    size = int(y[5, 0])
    assert size == 8, "lavapipe's; the shuffle above is written for it"
    groups = x.reshape(-1, size)
    np.testing.assert_allclose(y[0], np.repeat(groups.sum(1), size), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(y[1], np.repeat(groups.max(1), size))
    np.testing.assert_array_equal(y[2], np.repeat(groups[:, 3], size))
    lane = np.arange(64)
    np.testing.assert_array_equal(y[3], x[lane ^ 1])
    np.testing.assert_array_equal(y[4], x[lane ^ 2])


@T.prim_func(s_tir=True)
def from_any_lane(
    x: T.Buffer((64,), "float32"), lane: T.Buffer((1,), "int32"), y: T.Buffer((64,), "float32")
):
    for j in T.thread_binding(64, "threadIdx.x"):
        y[j] = T.call_pure_extern("float32", "subgroupBroadcast", x[j], lane[0])


def test_a_broadcast_from_a_lane_that_is_not_known():
    """Before SPIR-V 1.5 a broadcast takes lanes that are constants only, says spirv-val."""
    x = np.random.default_rng(1).standard_normal(64).astype("float32")
    *_, y = run(from_any_lane, [x, np.array([5], "int32"), np.zeros(64, "float32")], **SUBGROUPS)
    np.testing.assert_array_equal(y, np.repeat(x.reshape(-1, 8)[:, 5], 8))


def test_subgroups_are_refused_by_name():
    spirv.register()
    with pytest.raises(UnsupportedError, match="max_spirv_version"):
        tvm.compile(group, target=vulkan_target())
    with pytest.raises(UnsupportedError, match=r"subgroupAdd.*supported_subgroup_operations"):
        tvm.compile(group, target=vulkan_target(max_spirv_version=0x10300))


def dot(kind):
    return lambda a, b, c: tirx.call_pure_extern(kind, "dotPacked4x8EXT", a, b, c)


@pytest.mark.parametrize("kind", ["int32", "uint32"])
def test_integer_dot_product(kind):
    rng = np.random.default_rng(3)
    lanes = "int8" if kind == "int32" else "uint8"
    limits = np.iinfo(lanes)
    a, b = (rng.integers(limits.min, limits.max, (64, 4), lanes, endpoint=True) for _ in range(2))
    c = rng.integers(0, 1000, 64).astype(kind)
    words = [np.ascontiguousarray(v).view(kind).reshape(64) for v in (a, b)]
    (seen,) = run_vulkan(dot(kind), [*words, c])
    expected = (a.astype("int64") * b.astype("int64")).sum(1) + c
    np.testing.assert_array_equal(seen, expected.astype(kind))
    with pytest.raises(UnsupportedError, match="supports_integer_dot_product"):
        run_vulkan(dot(kind), [*words, c], supports_integer_dot_product=None)
