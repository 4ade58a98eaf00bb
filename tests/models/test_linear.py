"""Scratch memory that linear layers ask for."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tvm
from tvm import tirx
from tvm.relax.frontend import nn

from fairy_compile.kernels import FAMILIES
from fairy_compile.kernels.base import SCRATCH, ModelKernel
from fairy_compile.kernels.cuda import CudaPlanes
from fairy_compile.kernels.cuda_hopper import CudaHopper
from fairy_compile.models.linear import LinearCall, PlannedLinear, scratch_bytes
from fairy_compile.targets import load_target
from tests.kernels.cases import make_spec

SPEC = replace(
    make_spec((70, 9), 128 * 20, act="int16"), dtype="float16", out_dtype="float16"
)  # 20 groups: a record takes 544 bytes


def function(kernel: CudaPlanes, target: str, batch: str):
    return kernel.build_for_model(SPEC, load_target(target), batch, {"splits": 1})


@pytest.mark.parametrize("rows", [4, 8, 200])
def test_images_of_few_rows(rows: int) -> None:
    """Those of a launch: 8 rows, however many there are."""
    many = function(CudaPlanes(), "cuda", "many")
    assert scratch_bytes(many, rows) == 8 * 20 * 544
    assert "scratch" in many.script()


def test_any_number_of_rows() -> None:
    """Hopper's image of x: 256 rows at a time, float16."""
    rows = tirx.Var("rows", "int64")
    many = function(CudaHopper(), "cuda-hopper", "many")
    block = 2 * 256 * 128 * 20 * 2
    want = tirx.max(tirx.const(8 * 20 * 544, "int64"), (rows + 255) // 256 * block)
    tvm.ir.assert_structural_equal(scratch_bytes(many, rows), want, map_free_vars=True)
    assert scratch_bytes(many, 257) == 2 * block


def test_sums_of_blocks_that_share_columns() -> None:
    """Of 32 rows, in five shares; 79 complex outputs."""
    many = CudaPlanes().build_for_model(SPEC, load_target("cuda"), "many", {})
    most, step, size = json.loads(many.attrs[SCRATCH])[2]
    assert (most, step, size) == (32, 32, 5 * 32 * 158 * 4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("kernel", "target"), [(CudaPlanes(), "cuda"), (CudaHopper(), "cuda-hopper")]
)
def test_layers_allocate_what_their_function_takes(kernel, target: str, bias: bool) -> None:
    """And leave their bias to it."""
    call = LinearCall(
        "layer", ("a", "b"), SPEC.in_features, (140, 18), bias, "", SPEC, kernel,
        act_dtype="float16", out_dtype="float16",
    )  # fmt: skip
    layer = PlannedLinear(call, load_target(target))
    x = nn.spec.Tensor(["rows", SPEC.in_features], "float16")
    module = layer.export_tvm({"forward": {"x": x}})[0]
    calls = [
        binding.value
        for block in module["forward"].body.blocks
        for binding in block.bindings
        if getattr(getattr(binding.value, "op", None), "name", "") == "relax.call_tir"
    ]
    (own,) = calls
    assert len(own.args[1].fields) == 3 + bias  # x, codes, scales
    y, scratch = own.ty_args[0].fields
    assert (str(y.dtype), str(scratch.dtype)) == ("float16", "uint8")


def test_a_row_alone_takes_none() -> None:
    single = function(CudaPlanes(), "cuda", "single")
    assert SCRATCH not in single.attrs
    assert scratch_bytes(single, 1) is None


def test_bounds_do_not_exceed_what_functions_ask_for() -> None:
    needs = json.loads(function(CudaPlanes(), "cuda", "many").attrs[SCRATCH])
    assert [most for most, *_ in needs] == [4, 8]  # two rows are quantised by every block


def test_other_kernels_take_none() -> None:
    taking = {
        family
        for family, kernels in FAMILIES.items()
        if any(isinstance(kernel, ModelKernel) for kernel in kernels)
    }
    assert taking == {"cuda.planes", "cuda.hopper"}
