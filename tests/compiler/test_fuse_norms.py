"""A sum and the norm of it become one call, where nothing forbids it."""

from __future__ import annotations

import pytest
import tvm
from tvm import relax, tirx

from fairy_compile.compiler.fuse_norms import FuseAddNorm
from fairy_compile.kernels.cuda_norm import build_rms_norm

SIZE = 64


def module(kind: str) -> tvm.IRModule:
    """Return a function of x, y and a weight with one sum and one norm.

    ``kind``: ``sum`` normalises x + y, ``other`` normalises y, ``late`` computes the weight after
    the sum, ``broadcast`` adds a row to all of x.
    """
    bb = relax.BlockBuilder()
    rows = tirx.Var("rows", "int64")
    x = relax.Var("x", relax.TensorType((rows, 1, SIZE), "float16"))
    y_rows = 1 if kind == "broadcast" else rows
    y = relax.Var("y", relax.TensorType((y_rows, 1, SIZE), "float16"))
    weight = relax.Var("weight", relax.TensorType((SIZE,), "float32"))
    norm = bb.add_func(build_rms_norm(SIZE, 1e-5, "float16", "many"), "rms_norm")
    with bb.function("main", [x, y, weight]):
        with bb.dataflow():
            total = bb.emit(relax.op.add(x, y))
            factor = bb.emit(relax.op.add(weight, weight)) if kind == "late" else weight
            flat = bb.emit(relax.op.reshape(y if kind == "other" else total, (rows, SIZE)))
            ty = relax.TensorType((rows, SIZE), "float16")
            normed = bb.emit(relax.call_tir(norm, [flat, factor], ty))
            shaped = bb.emit(relax.op.reshape(normed, (rows, 1, SIZE)))
            result = bb.emit_output(relax.Tuple([total, shaped]))
        bb.emit_func_output(result)
    return bb.finalize()


def calls(fused: tvm.IRModule) -> list[str]:
    """Return what ``main`` calls: ``add``, ``norm`` or ``both``; reshapes left out."""
    names = []
    for block in fused["main"].body.blocks:
        for binding in block.bindings:
            op = getattr(getattr(binding.value, "op", None), "name", "")
            if op == "relax.call_tir":
                name = binding.value.args[0].name_hint
                names.append("both" if name.startswith("add_rms_norm") else "norm")
            elif op == "relax.add":
                names.append("add")
    return names


def test_a_sum_and_its_norm_are_one_call() -> None:
    fused = FuseAddNorm()(module("sum"))
    assert calls(fused) == ["both"]
    relax.analysis.well_formed(fused)  # raises where it is not
    before, after = (m["main"].ret_ty for m in (module("sum"), fused))
    assert [str(t.shape) for t in before.fields] == [str(t.shape) for t in after.fields]


@pytest.mark.parametrize("kind", ["other", "late"])
def test_others_stay_apart(kind: str) -> None:
    assert calls(FuseAddNorm()(module(kind))) == calls(module(kind))


def test_a_row_added_to_all_stays_apart() -> None:
    assert calls(FuseAddNorm()(module("broadcast"))) == ["add", "norm"]
