"""Cooperative matrices: valid SPIR-V, what it declares, and what targets without them are told.

lavapipe as of Mesa 22.3 cannot run them; `tests/kernels/test_gpu_matrix_tile.py` runs the tile with
emulated ones.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import tvm
from tvm.tirx.script import builder as T

from fairy_compile.codegen import spirv
from fairy_compile.codegen.spirv.enums import Capability, MemoryModel, Op
from fairy_compile.errors import UnsupportedError
from fairy_compile.kernels.gpu_builder import build_function, launch, local, shared, store
from fairy_compile.kernels.vulkan import VULKAN_KERNELS
from fairy_compile.kernels.vulkan_tile import CooperativeUnits
from tests.emulation.gpu_cases import gpu_spec, host_target
from tests.emulation.spirv_val import missing_validator, validate
from tests.emulation.vulkan_module import kernels_of
from tests.emulation.vulkan_target import vulkan_target

MATRICES = {"supports_cooperative_matrix": True, "max_spirv_version": 0x10600}
SIDE = CooperativeUnits.side


@pytest.fixture(scope="module", autouse=True)
def validator() -> None:
    reason = missing_validator(2024)
    if reason:
        pytest.skip(reason)


def product():
    """Return y = a b of one 16x16 matrix each, by one subgroup."""
    units = CooperativeUnits()

    def body() -> None:
        a = T.arg("a", T.buffer((SIDE, SIDE), "float16"))
        y = T.arg("y", T.buffer((SIDE, SIDE)))
        with launch({"blockIdx.x": 1, "threadIdx.x": 32}) as (_, thread):
            tile, result = shared((SIDE, SIDE), "float16"), shared((SIDE, SIDE))
            for i in range(SIDE // 2):
                at = (2 * i + thread // SIDE, thread % SIDE)
                store(tile, at, a[at])
            sums = units.matrices(1, "float32")
            left, right = units.matrices(1, "float16"), units.matrices(1, "float16")
            units.clear(sums, 0)
            units.load_left(left, 0, tile, (0, 0))
            units.load_right(right, 0, tile, (0, 0))
            units.multiply(sums, 0, left, 0, right, 0)
            units.store(sums, 0, result, (0, 0))
            for i in range(SIDE // 2):
                at = (2 * i + thread // SIDE, thread % SIDE)
                store(y, at, result[at])

    return build_function("product", body).with_attr("global_symbol", "main")


def compile_kernel(function, **changes):
    spirv.register()
    (kernel,) = kernels_of(tvm.compile(function, target=vulkan_target(**changes))).values()
    return kernel.code


def instructions(code: bytes) -> list[tuple[int, list[int]]]:
    """Return (opcode, operands) of every instruction."""
    words = [int.from_bytes(code[i : i + 4], "little") for i in range(20, len(code), 4)]
    found, at = [], 0
    while at < len(words):
        count = words[at] >> 16
        found.append((words[at] & 0xFFFF, words[at + 1 : at + count]))
        at += count
    return found


def test_a_product_is_valid_and_declares_what_it_needs():
    code = compile_kernel(product(), **MATRICES)
    validate(code)
    found = instructions(code)
    capabilities = {operands[0] for op, operands in found if op == Op.Capability}
    assert {Capability.CooperativeMatrixKHR, Capability.VulkanMemoryModel} <= capabilities
    assert b"SPV_KHR_cooperative_matrix" in code
    ((_, model),) = [operands for op, operands in found if op == Op.MemoryModel]
    assert model == MemoryModel.Vulkan
    opcodes = [op for op, _ in found]
    assert opcodes.count(Op.CooperativeMatrixLoadKHR) == 2
    assert opcodes.count(Op.CooperativeMatrixMulAddKHR) == 1
    assert opcodes.count(Op.CooperativeMatrixStoreKHR) == 1
    assert opcodes.count(Op.TypeCooperativeMatrixKHR) == 3, "A, B and the sums differ in use"


def test_other_kernels_keep_the_plain_memory_model():
    def body() -> None:
        y = T.arg("y", T.buffer((32,)))
        with launch({"threadIdx.x": 32}) as (thread,):
            value = local((1,))
            store(value, 0, T.float32(1))
            store(y, thread, value[0])

    code = compile_kernel(
        build_function("plain", body).with_attr("global_symbol", "main"), **MATRICES
    )
    ((_, model),) = [operands for op, operands in instructions(code) if op == Op.MemoryModel]
    assert model == MemoryModel.GLSL450


@pytest.mark.parametrize(
    ("changes", "attribute"),
    [
        ({"max_spirv_version": 0x10600}, "supports_cooperative_matrix"),
        ({"supports_cooperative_matrix": True, "max_spirv_version": 0x10300}, "max_spirv_version"),
    ],
)
def test_targets_without_them_are_told(changes, attribute):
    with pytest.raises(UnsupportedError, match=f"cooperative matrix.*{attribute}"):
        compile_kernel(product(), **changes)


@pytest.mark.parametrize(("parts", "m", "terms"), [((40,), 48, ("U", "W")), ((9, 3), 65, ("W",))])
def test_prefill_on_matrices_is_valid(parts, m, terms):
    spirv.register()
    kernel, target = VULKAN_KERNELS[0], host_target("vulkan-nvidia")
    spec = gpu_spec((parts, m, 2, terms, "tensor"), "float16")
    built = {}
    for matrices in (True, False):
        function = kernel.build(spec, target, "many", {"matrices": matrices, "switch": 0})
        module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
        (found,) = kernels_of(tvm.compile(module, target=target.to_tvm())).values()
        validate(found.code)
        built[matrices] = {op for op, _ in instructions(found.code)}
    assert Op.CooperativeMatrixMulAddKHR in built[True] - built[False]
    without = replace(target, features=target.features - {"cooperative_matrix"})
    assert "cooperative" not in kernel.build(spec, without, "many", {"matrices": True}).script()
