"""Intrinsic calls: one function for each group of TIR operators, found by the operator's name.

TVM spreads its operators over the namespaces ``tirx`` and ``prim``; names are compared without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tvm.tirx import IntImm

from fairy_compile.codegen.spirv import matrices
from fairy_compile.codegen.spirv.dtypes import UINT32, DType, Kind, dtype_of
from fairy_compile.codegen.spirv.enums import (
    SPIRV_1_5,
    BuiltIn,
    Capability,
    Extension,
    Glsl,
    GroupOperation,
    MemoryModel,
    MemorySemantics,
    Op,
    PackedVectorFormat,
    Scope,
    SubgroupFeature,
)
from fairy_compile.codegen.spirv.values import Value

if TYPE_CHECKING:
    from fairy_compile.codegen.spirv.expressions import Expressions

Emitter = Callable[["Expressions", Any, DType], Value]
"""Emits a call, given the node and the type of its result."""

_EXACT_IN_64_BITS = {
    Glsl.RoundEven, Glsl.Trunc, Glsl.FAbs, Glsl.Floor, Glsl.Ceil,
    Glsl.Sqrt, Glsl.InverseSqrt, Glsl.Fma,
}  # fmt: skip

_BINARY = {
    "bitwise_and": "BitwiseAnd",
    "bitwise_or": "BitwiseOr",
    "bitwise_xor": "BitwiseXor",
    "shift_left": "LShift",
    "shift_right": "RShift",
    "fmod": "Mod",
}

_BARRIERS = {
    # TVM's "shared" is CUDA's __syncthreads: it orders global memory within the block as well.
    "shared": (
        Scope.Workgroup,
        MemorySemantics.AcquireRelease
        | MemorySemantics.WorkgroupMemory
        | MemorySemantics.UniformMemory,
    ),
    "warp": (
        Scope.Subgroup,
        MemorySemantics.AcquireRelease
        | MemorySemantics.SubgroupMemory
        | MemorySemantics.WorkgroupMemory,
    ),
}


def emit_call(ex: Expressions, call: Any) -> Value:
    """Emit a call that has a result.

    Raises:
        UnsupportedError: no rule for the operator, or the target lacks what it needs.
    """
    name = call.op.name.split(".", 1)[1]
    emitter = _EMITTERS.get(name)
    if emitter is None:
        raise ex.error.unsupported(f"operator {call.op.name} in {call}")
    return emitter(ex, call, dtype_of(call))


def emit_effect(ex: Expressions, call: Any) -> None:
    """Emit a call for its effect."""
    name = call.op.name.split(".", 1)[1]
    if name == "tvm_storage_sync":
        _barrier(ex, call)
    elif name in matrices.OPERATORS:
        matrices.emit(ex, name, call)
    elif name == "thread_return":
        ex.function.leave(None)
    elif name in ("break_loop", "continue_loop"):
        loop = ex.function.loops[-1]
        ex.function.leave(loop.merge_label if name == "break_loop" else loop.continue_label)
    else:
        emit_call(ex, call)


def _barrier(ex: Expressions, call: Any) -> None:
    kind = str(call.args[0].value)
    if kind not in _BARRIERS:
        raise ex.error.unsupported(f"synchronisation of {kind!r} memory")
    scope, semantics = _BARRIERS[kind]
    if ex.module.memory_model is MemoryModel.Vulkan:
        semantics |= MemorySemantics.MakeAvailable | MemorySemantics.MakeVisible
    if kind == "warp":
        ex.module.target.subgroup(SubgroupFeature.Basic, "a subgroup barrier", ex.error)
        ex.module.use_capability(Capability.GroupNonUniform)
    scope_id = ex.module.constant(scope, UINT32)
    ex.function.emit_void(
        Op.ControlBarrier, scope_id, scope_id, ex.module.constant(semantics, UINT32)
    )


# ------------------------------------------------------------------- plain ones


def _glsl(ex: Expressions, call: Any, dtype: DType) -> Value:
    number, *operands = call.args
    instruction = Glsl(int(number))
    if dtype.bits == 64 and instruction not in _EXACT_IN_64_BITS:
        raise ex.error.unsupported(f"{instruction.name} of {dtype}")
    return ex.arithmetic.glsl(instruction, dtype, *map(ex.value, operands))


def _binary(ex: Expressions, call: Any, dtype: DType) -> Value:
    a, b = map(ex.value, call.args)
    return ex.arithmetic.binary(_BINARY[call.op.name.split(".", 1)[1]], a, b)


def _first_argument(ex: Expressions, call: Any, dtype: DType) -> Value:
    return ex.value(call.args[0])


def _lazy_choice(ex: Expressions, call: Any, dtype: DType) -> Value:
    condition, then, otherwise = call.args
    chosen = ex.value(condition)
    if chosen.dtype.lanes > 1:
        raise ex.error.unsupported(f"if_then_else with a vector condition, {condition}")
    parts = ex.function.select_branch(
        chosen.id,
        lambda: ex.value(then).parts,
        lambda: ex.value(otherwise).parts,
        dtype.parts(),
    )
    return Value(dtype, tuple(parts))


def _large_uint(ex: Expressions, call: Any, dtype: DType) -> Value:
    low, high = (int(half) for half in call.args)
    return ex.arithmetic.constant(high << 32 | low, dtype)


def _reinterpret(ex: Expressions, call: Any, dtype: DType) -> Value:
    return ex.arithmetic.reinterpret(ex.value(call.args[0]), dtype)


def _popcount(ex: Expressions, call: Any, dtype: DType) -> Value:
    return ex.arithmetic.cast(ex.arithmetic.popcount(ex.value(call.args[0])), dtype)


def _leading_zeros(ex: Expressions, call: Any, dtype: DType) -> Value:
    return ex.arithmetic.cast(ex.arithmetic.leading_zeros(ex.value(call.args[0])), dtype)


def _classify(op: Op) -> Emitter:
    def emit(ex: Expressions, call: Any, dtype: DType) -> Value:
        return ex.arithmetic.map(op, dtype, ex.value(call.args[0]))

    return emit


# -------------------------------------------------------------------- subgroups

_SUBGROUP_CAPABILITIES = {
    SubgroupFeature.Basic: Capability.GroupNonUniform,
    SubgroupFeature.Arithmetic: Capability.GroupNonUniformArithmetic,
    SubgroupFeature.Ballot: Capability.GroupNonUniformBallot,
    SubgroupFeature.Shuffle: Capability.GroupNonUniformShuffle,
    SubgroupFeature.ShuffleRelative: Capability.GroupNonUniformShuffleRelative,
}


def _use_subgroups(ex: Expressions, feature: SubgroupFeature, what: str) -> int:
    """Check and declare subgroup operations; return the id of the scope."""
    ex.module.target.subgroup(feature, what, ex.error)
    ex.module.use_capability(Capability.GroupNonUniform)
    ex.module.use_capability(_SUBGROUP_CAPABILITIES[feature])
    return ex.module.constant(Scope.Subgroup, UINT32)


def _subgroup(
    ex: Expressions,
    op: Op,
    feature: SubgroupFeature,
    what: str,
    *operands: Value,
    reduce: bool = False,
) -> Value:
    """Emit an operation of the lanes of a subgroup; it depends on the lanes that are active."""
    value = operands[0]
    ex.module.use_arithmetic(value.dtype)
    scope = _use_subgroups(ex, feature, what)
    literals = (GroupOperation.Reduce,) if reduce else ()
    others = [operand.id for operand in operands[1:]]
    parts = [
        ex.function.emit_impure(op, ex.module.type(dtype), scope, *literals, part, *others)
        for part, dtype in zip(value.parts, value.dtype.parts(), strict=True)
    ]
    return Value(value.dtype, tuple(parts))


def _warp_shuffle(op: Op, feature: SubgroupFeature) -> Emitter:
    """TVM's ``tvm_warp_shuffle*(mask, value, lane, width, warp_size)``."""

    def emit(ex: Expressions, call: Any, dtype: DType) -> Value:
        _, value, lane, width, warp_size = call.args
        if int(width) != int(warp_size):
            raise ex.error.unsupported(f"a shuffle of part of a warp, {call}")
        index = ex.arithmetic.cast(ex.value(lane), UINT32)
        return _subgroup(ex, op, feature, call.op.name, ex.value(value), index)

    return emit


_SUBGROUP_REDUCTIONS = {
    "subgroupAdd": {
        Kind.FLOAT: Op.GroupNonUniformFAdd,
        Kind.INT: Op.GroupNonUniformIAdd,
        Kind.UINT: Op.GroupNonUniformIAdd,
    },
    "subgroupMin": {
        Kind.FLOAT: Op.GroupNonUniformFMin,
        Kind.INT: Op.GroupNonUniformSMin,
        Kind.UINT: Op.GroupNonUniformUMin,
    },
    "subgroupMax": {
        Kind.FLOAT: Op.GroupNonUniformFMax,
        Kind.INT: Op.GroupNonUniformSMax,
        Kind.UINT: Op.GroupNonUniformUMax,
    },
}

_SUBGROUP_MOVES = {
    "subgroupBroadcast": (Op.GroupNonUniformBroadcast, SubgroupFeature.Ballot),
    "subgroupBroadcastFirst": (Op.GroupNonUniformBroadcastFirst, SubgroupFeature.Ballot),
    "subgroupShuffle": (Op.GroupNonUniformShuffle, SubgroupFeature.Shuffle),
    "subgroupShuffleXor": (Op.GroupNonUniformShuffleXor, SubgroupFeature.Shuffle),
    "subgroupShuffleUp": (Op.GroupNonUniformShuffleUp, SubgroupFeature.ShuffleRelative),
    "subgroupShuffleDown": (Op.GroupNonUniformShuffleDown, SubgroupFeature.ShuffleRelative),
}

_SUBGROUP_BUILT_INS = {
    "gl_SubgroupSize": BuiltIn.SubgroupSize,
    "gl_NumSubgroups": BuiltIn.NumSubgroups,
    "gl_SubgroupID": BuiltIn.SubgroupId,
    "gl_SubgroupInvocationID": BuiltIn.SubgroupLocalInvocationId,
}


# ----------------------------------------------------------- integer dot product


def _dot(ex: Expressions, op: Op, call: Any, a: Value, b: Value, accumulator: Value) -> Value:
    """Emit the dot product of four 8-bit lanes, added to a 32-bit accumulator."""
    ex.module.target.dot_product(f"a dot product, {call},", ex.error)
    ex.module.use_extension(Extension.INTEGER_DOT_PRODUCT)
    ex.module.use_capability(Capability.DotProduct)
    ex.module.use_capability(Capability.DotProductInput4x8BitPacked)
    packed = [
        operand if operand.dtype.lanes == 1 else ex.arithmetic.reinterpret(operand, UINT32)
        for operand in (a, b)
    ]
    kind = Kind.UINT if op is Op.UDot else Kind.INT
    words = [ex.arithmetic.cast(operand, UINT32.with_kind(kind)) for operand in packed]
    product = ex.function.emit(
        op,
        accumulator.dtype,
        words[0].id,
        words[1].id,
        PackedVectorFormat.PackedVectorFormat4x8Bit,
    )
    return ex.arithmetic.binary("Add", Value(accumulator.dtype, (product,)), accumulator)


def _dp4a(ex: Expressions, call: Any, dtype: DType) -> Value:
    return _dot_of(ex, call, [ex.value(arg) for arg in call.args], dtype)


def _dot_of(ex: Expressions, call: Any, operands: list[Value], dtype: DType) -> Value:
    """Emit ``dot(a, b)`` or, with a third operand, ``dot(a, b) + accumulator``."""
    a, b, *accumulator = operands
    op = Op.UDot if dtype.kind is Kind.UINT else Op.SDot
    total = accumulator[0] if accumulator else ex.arithmetic.constant(0, dtype)
    return _dot(ex, op, call, a, b, total)


_DOT_FUNCTIONS = ("dotPacked4x8EXT", "__dp4a")


def _lane(ex: Expressions, index: Any) -> Value:
    """Return the number of a lane; one that is known is a constant in the module, too."""
    if isinstance(index, IntImm):
        return ex.arithmetic.constant(int(index.value), UINT32)
    return ex.arithmetic.cast(ex.value(index), UINT32)


def _may_broadcast(ex: Expressions, index: Any) -> bool:
    """Tell whether a broadcast may name its lane so: before SPIR-V 1.5 by a constant only."""
    return isinstance(index, IntImm) or ex.module.target.spirv_version >= SPIRV_1_5


def _extern(ex: Expressions, call: Any, dtype: DType) -> Value:
    """Functions of GLSL's extensions, and CUDA's ``__dp4a``, through ``call_pure_extern``."""
    name = str(call.args[0].value)
    operands = [ex.value(arg) for arg in call.args[1:]]
    if name in _SUBGROUP_REDUCTIONS:
        op = _SUBGROUP_REDUCTIONS[name].get(dtype.kind)
        if op is None:
            raise ex.error.unsupported(f"{name} of {dtype}")
        return _subgroup(ex, op, SubgroupFeature.Arithmetic, name, *operands, reduce=True)
    if name in _SUBGROUP_MOVES:
        op, feature = _SUBGROUP_MOVES[name]
        value, lanes = operands[0], [_lane(ex, arg) for arg in call.args[2:]]
        if op is Op.GroupNonUniformBroadcast and not _may_broadcast(ex, call.args[2]):
            op, feature = Op.GroupNonUniformShuffle, SubgroupFeature.Shuffle
        return _subgroup(ex, op, feature, name, value, *lanes)
    if name in _SUBGROUP_BUILT_INS:
        _use_subgroups(ex, SubgroupFeature.Basic, name)
        return ex.arithmetic.cast(ex.built_in(_SUBGROUP_BUILT_INS[name]), dtype)
    if name in _DOT_FUNCTIONS:
        return _dot_of(ex, call, operands, dtype)
    raise ex.error.unsupported(f"external function {name}")


_EMITTERS: dict[str, Emitter] = {
    **dict.fromkeys(_BINARY, _binary),
    **dict.fromkeys(("likely", "tvm_thread_invariant", "buffer_data"), _first_argument),
    "call_spirv_pure_glsl450": _glsl,
    "if_then_else": _lazy_choice,
    "large_uint_imm": _large_uint,
    "reinterpret": _reinterpret,
    "popcount": _popcount,
    "ctpop": _popcount,
    "clz": _leading_zeros,
    "isnan": _classify(Op.IsNan),
    "isinf": _classify(Op.IsInf),
    "bitwise_not": lambda ex, call, dtype: ex.arithmetic.invert(ex.value(call.args[0])),
    "tvm_warp_shuffle": _warp_shuffle(Op.GroupNonUniformShuffle, SubgroupFeature.Shuffle),
    "tvm_warp_shuffle_xor": _warp_shuffle(Op.GroupNonUniformShuffleXor, SubgroupFeature.Shuffle),
    "tvm_warp_shuffle_up": _warp_shuffle(
        Op.GroupNonUniformShuffleUp, SubgroupFeature.ShuffleRelative
    ),
    "tvm_warp_shuffle_down": _warp_shuffle(
        Op.GroupNonUniformShuffleDown, SubgroupFeature.ShuffleRelative
    ),
    # The mask of active lanes only feeds the shuffles' first argument, which Vulkan does not have.
    "tvm_warp_activemask": lambda ex, call, dtype: ex.arithmetic.constant(0, dtype),
    "dp4a": _dp4a,
    "call_pure_extern": _extern,
}
