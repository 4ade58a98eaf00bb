"""Rows are quantised by what computes them, where only layers that decode take them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tvm
from tvm import relax

from fairy_compile.compiler.fuse_norms import FuseAddNorm
from fairy_compile.compiler.quantize_once import QuantizeOnce
from fairy_compile.kernels.base import ArraySpec
from fairy_compile.kernels.cuda import CudaPlanes
from fairy_compile.kernels.cuda_gate import build_gate_product
from fairy_compile.kernels.cuda_norm import build_rms_norm
from fairy_compile.targets import load_target
from tests.kernels.cases import make_spec

SIZE = 256
KERNEL = CudaPlanes()
FLOAT16 = {"dtype": "float16", "out_dtype": "float16"}


def layer(bb: relax.BlockBuilder, act: str, size: int, bias: bool):
    spec = replace(make_spec((24,), size // 2, act=act), bias=bias, **FLOAT16)
    func = KERNEL.build_for_model(spec, load_target("cuda"), "single", {"prefetch": 4})
    return bb.add_func(func.with_attr("op_pattern", 8), f"layer_{act}_{size}"), spec


def call_layer(bb: relax.BlockBuilder, x: relax.Expr, act: str, size: int, bias: bool):
    symbol, spec = layer(bb, act, size, bias)
    arrays = list(KERNEL.layout.arrays(spec).values())
    arrays += [ArraySpec((spec.out_features,), "float32")] * bias
    weights = [bb.emit(relax.op.zeros(a.shape, a.dtype)) for a in arrays]
    flat = bb.emit(relax.op.reshape(x, (1, size)))
    ty = relax.TensorType((1, spec.out_features), "float16")
    return bb.emit(relax.call_tir(symbol, [flat, *weights], ty))


def module(kind: str) -> tvm.IRModule:
    """Return a function with a producer of a row and what takes it.

    ``kind``: ``norm``, ``sum`` (and its norm) and ``gate`` produce for two layers, as does the norm
    of ``bias``, whose layers have one. The others are norms whose row is ``returned`` too, goes to
    layers of two ``contracts``, or to ``nothing`` but the output; ``small`` has rows of no whole
    group of columns.
    """
    bb = relax.BlockBuilder()
    size = 64 if kind == "small" else SIZE
    row = relax.TensorType((1, 1, size), "float16")
    x, y = relax.Var("x", row), relax.Var("y", row)
    weight = relax.Var("weight", relax.TensorType((size,), "float32"))
    both = relax.Var("both", relax.TensorType((1, 2 * size), "float16"))
    with bb.function("main", [x, y, weight, both]):
        with bb.dataflow():
            outputs = []
            flat_ty = relax.TensorType((1, size), "float16")
            if kind == "gate":
                func = bb.add_func(build_gate_product("silu", size, "float16"), "gate")
                made = bb.emit(relax.call_tir(func, [both], flat_ty))
            else:
                func = bb.add_func(build_rms_norm(size, 1e-5, "float16", "single"), "norm")
                total = bb.emit(relax.op.add(x, y)) if kind == "sum" else x
                outputs += [total] if kind == "sum" else []
                flat = bb.emit(relax.op.reshape(total, (1, size)))
                made = bb.emit(relax.call_tir(func, [flat, weight], flat_ty))
            made = bb.emit(relax.op.reshape(made, (1, 1, size)))
            if kind == "nothing":
                outputs.append(made)
            else:
                acts = ("int16", "int8" if kind == "contracts" else "int16")
                outputs += [call_layer(bb, made, act, size, kind == "bias") for act in acts]
            if kind == "returned":
                outputs.append(made)
            result = bb.emit_output(relax.Tuple(outputs))
        bb.emit_func_output(result)
    return FuseAddNorm()(bb.finalize())


def calls(rewritten: tvm.IRModule) -> list[str]:
    """Return the functions that ``main`` calls."""
    return [
        binding.value.args[0].name_hint
        for block in rewritten["main"].body.blocks
        for binding in block.bindings
        if getattr(getattr(binding.value, "op", None), "name", "") == "relax.call_tir"
    ]


@pytest.mark.parametrize("kind", ["norm", "sum", "gate", "bias"])
def test_layers_take_the_image_of_their_row(kind: str) -> None:
    before = module(kind)
    after = QuantizeOnce()(before)
    relax.analysis.well_formed(after)  # raises where it is not
    first, *layers = calls(after)
    assert first.endswith(f"{SIZE}_int16")
    assert len(layers) == 2
    assert len(set(layers)) == 1
    assert layers[0].endswith("_single_image")
    assert str(before["main"].ret_ty) == str(after["main"].ret_ty)
    assert 'T.Buffer((1, 544), "uint8")' in after[layers[0]].script()


def test_knobs_of_the_layer_stay() -> None:
    after = QuantizeOnce()(module("norm"))
    assert "kPrefetch = 4;" in after[calls(after)[-1]].script()


@pytest.mark.parametrize("kind", ["returned", "contracts", "nothing", "small"])
def test_others_stay_as_they_are(kind: str) -> None:
    before = module(kind)
    tvm.ir.assert_structural_equal(QuantizeOnce()(before), before)


def one_layer(*, add: bool, weights_first: bool = True) -> tvm.IRModule:
    """Return a norm, of a sum or not, that a single layer takes."""
    bb, row = relax.BlockBuilder(), relax.TensorType((1, SIZE), "float16")
    x, y = relax.Var("x", row), relax.Var("y", row)
    weight = relax.Var("weight", relax.TensorType((SIZE,), "float32"))
    with bb.function("main", [x, y, weight]):
        with bb.dataflow():
            symbol, spec = layer(bb, "int16", SIZE, False)
            arrays = KERNEL.layout.arrays(spec).values()
            zeros = [relax.op.zeros(a.shape, a.dtype) for a in arrays]
            weights = [bb.emit(array) for array in zeros] if weights_first else []
            func = bb.add_func(build_rms_norm(SIZE, 1e-5, "float16", "single"), "norm")
            total = bb.emit(relax.op.add(x, y)) if add else x
            made = bb.emit(relax.call_tir(func, [total, weight], row))
            made = bb.emit(relax.op.reshape(bb.emit(relax.op.reshape(made, (SIZE,))), (1, SIZE)))
            weights = weights or [bb.emit(array) for array in zeros]
            out = relax.TensorType((1, spec.out_features), "float16")
            made = bb.emit(relax.call_tir(symbol, [made, *weights], out))
            result = bb.emit_output(relax.Tuple([total, made]) if add else made)
        bb.emit_func_output(result)
    return FuseAddNorm()(bb.finalize())


@pytest.mark.parametrize("add", [False, True])
def test_a_single_layer_normalises_its_row(add: bool) -> None:
    before = one_layer(add=add)
    after = QuantizeOnce()(before)
    relax.analysis.well_formed(after)
    (only,) = calls(after)
    assert only.endswith("_single_normed")
    assert str(before["main"].ret_ty) == str(after["main"].ret_ty)
    script = after[only].script()
    assert f"kAdd = {int(add)};" in script
    assert "kPrefetch = 4;" in script  # knobs of the layer stay


@pytest.mark.parametrize("add", [False, True])
def test_a_layer_whose_weights_come_later_takes_an_image(add: bool) -> None:
    after = QuantizeOnce()(one_layer(add=add, weights_first=False))
    norm, only = calls(after)
    assert norm.endswith(f"{SIZE}_int16")
    assert only.endswith("_single_image")
