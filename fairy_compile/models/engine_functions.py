"""Functions an engine calls besides the network: sampling helpers, workspace, metadata.

Names, argument order and meaning follow the contract of the MLC engine (see
`artifact.contract`, which checks what is built here).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import tvm
from tvm import relax, te, tirx
from tvm.relax.frontend.nn import Tensor, op
from tvm.script import tirx as T

from fairy_compile.kernels import logits_gpu

if TYPE_CHECKING:
    from fairy_compile.targets import Target

# Below this temperature an engine expects the arg-max distribution.
GREEDY_TEMPERATURE = 1e-5


def softmax_with_temperature(logits: Tensor, temperature: Tensor, target: Target) -> Tensor:
    """Softmax of logits (b, 1, v) at temperature (b,), both float32 -> (b, 1, v).

    At temperatures up to `GREEDY_TEMPERATURE` the maxima share probability 1 evenly.
    """
    if target.is_gpu:
        return op.tensor_ir_op(
            logits_gpu.build_softmax(GREEDY_TEMPERATURE).with_attr("op_pattern", 8),
            "softmax_with_temperature",
            [logits, temperature],
            Tensor.placeholder(logits.shape, "float32"),
        )

    def define(x: te.Tensor, t: te.Tensor) -> te.Tensor:
        batch, vocab = x.shape[0], x.shape[2]
        threshold = tirx.const(GREEDY_TEMPERATURE, "float32")
        k = te.reduce_axis((0, vocab), "k")
        peak = te.compute((batch,), lambda i: te.max(x[i, 0, k], axis=k), name="peak")

        def weight(i: Any, j: Any) -> Any:
            safe = tirx.Select(t[i] > threshold, t[i], tirx.const(1, "float32"))
            soft = te.exp((x[i, 0, j] - peak[i]) / safe)
            hard = tirx.Cast("float32", x[i, 0, j] == peak[i])
            return tirx.Select(t[i] > threshold, soft, hard)

        weights = te.compute((batch, vocab), weight, name="weights")
        k2 = te.reduce_axis((0, vocab), "k2")
        total = te.compute((batch,), lambda i: te.sum(weights[i, k2], axis=k2), name="total")
        return te.compute((batch, 1, vocab), lambda i, _, j: weights[i, j] / total[i], name="prob")

    return op.tensor_expr_op(define, "softmax_with_temperature", [logits, temperature])


def _scheduled(name: str) -> dict[str, Any]:
    return {"global_symbol": name, "tirx.noalias": True, "tirx.is_scheduled": True}


def inplace_functions(target: Target) -> dict[str, tirx.PrimFunc]:
    """Return the three functions that edit logits (b, v) float32 in place."""
    return logits_gpu.inplace_functions() if target.is_gpu else _inplace_functions_cpu()


def _inplace_functions_cpu() -> dict[str, tirx.PrimFunc]:

    @T.prim_func(s_tir=True)
    def apply_logit_bias(
        var_logits: T.handle, var_row: T.handle, var_token: T.handle, var_bias: T.handle
    ):
        rows, vocab, count = T.int32(), T.int32(), T.int32()
        logits = T.match_buffer(var_logits, (rows, vocab), "float32")
        row = T.match_buffer(var_row, (count,), "int32")
        token = T.match_buffer(var_token, (count,), "int32")
        bias = T.match_buffer(var_bias, (count,), "float32")
        for i in range(count):
            logits[row[i], token[i]] = logits[row[i], token[i]] + bias[i]

    @T.prim_func(s_tir=True)
    def apply_penalty(
        var_logits: T.handle,
        var_sequence: T.handle,
        var_position: T.handle,
        var_token: T.handle,
        var_times: T.handle,
        var_penalty: T.handle,
    ):
        rows, vocab, sequences, count = T.int32(), T.int32(), T.int32(), T.int32()
        logits = T.match_buffer(var_logits, (rows, vocab), "float32")
        sequence = T.match_buffer(var_sequence, (sequences,), "int32")
        position = T.match_buffer(var_position, (count,), "int32")
        token = T.match_buffer(var_token, (count,), "int32")
        times = T.match_buffer(var_times, (count,), "int32")
        # Columns: presence, frequency, repetition.
        penalty = T.match_buffer(var_penalty, (sequences, 3), "float32")
        for i in range(count):
            logits[sequence[position[i]], token[i]] = logits[sequence[position[i]], token[i]] - (
                penalty[position[i], 0] + T.cast(times[i], "float32") * penalty[position[i], 1]
            )
            logits[sequence[position[i]], token[i]] = T.if_then_else(
                logits[sequence[position[i]], token[i]] < T.float32(0),
                logits[sequence[position[i]], token[i]] * penalty[position[i], 2],
                logits[sequence[position[i]], token[i]] / penalty[position[i], 2],
            )

    @T.prim_func(s_tir=True)
    def apply_bitmask(var_logits: T.handle, var_sequence: T.handle, var_mask: T.handle):
        rows, vocab, sequences = T.int32(), T.int32(), T.int32()
        logits = T.match_buffer(var_logits, (rows, vocab), "float32")
        sequence = T.match_buffer(var_sequence, (sequences,), "int32")
        mask = T.match_buffer(var_mask, (rows, (vocab + 31) // 32), "int32")
        for i, j in T.grid(sequences, vocab):
            logits[sequence[i], j] = T.if_then_else(
                (mask[sequence[i], j // 32] >> (j % 32)) & 1 == 1,
                logits[sequence[i], j],
                T.min_value("float32"),
            )

    functions = {
        "apply_logit_bias_inplace": apply_logit_bias,
        "apply_penalty_inplace": apply_penalty,
        "apply_bitmask_inplace": apply_bitmask,
    }
    return {name: func.with_attr(_scheduled(name)) for name, func in functions.items()}


def add_embedding_buffer(bb: relax.BlockBuilder, rows: int, hidden: int, dtype: str) -> None:
    """Add ``alloc_embedding_tensor() -> (rows, hidden)``, the engine's prefill workspace."""
    with bb.function("alloc_embedding_tensor", []):
        buffer = relax.op.builtin.alloc_tensor(relax.ShapeExpr([rows, hidden]), dtype, 0)
        bb.emit_func_output(bb.emit(buffer))


def add_metadata(bb: relax.BlockBuilder, metadata: Mapping[str, Any]) -> None:
    """Add ``_metadata() -> str``, the JSON an engine reads before anything else."""
    with bb.function("_metadata", []):
        bb.emit_func_output(tvm.ir.StringImm(json.dumps(metadata)))
