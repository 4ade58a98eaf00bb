"""Rotary position embedding on CPUs: splits fused query, key and value rows and rotates two."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from fairy_compile.errors import UnsupportedError
from fairy_compile.kernels import attention_cpu_vector as vec
from fairy_compile.kernels.attention_cpu_decode import index_buffer
from fairy_compile.kernels.attention_cpu_pages import parallel_tokens
from fairy_compile.kernels.attention_cpu_vector import VectorUnit, span, store
from fairy_compile.kernels.attention_shape import AttentionShape
from fairy_compile.op.rope import RopeTable

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer, PrimFunc


def build_rope(shape: AttentionShape, unit: VectorUnit, table: RopeTable) -> PrimFunc:
    """Return ``fused_rope``: splits qkv and rotates queries and keys.

    Arguments: qkv (n, heads + 2 kv_heads, head_dim), position_map int32 (n,), q (n, heads,
    head_dim), k and v (n, kv_heads, head_dim), apply_rope int64. Elements i and i + rotary_dim / 2
    of a head are a pair, turned by position * frequencies[i]; those from rotary_dim on stay.

    Raises:
        UnsupportedError: heads have fewer elements than are to turn.
    """
    return _Rope(shape, unit, table).emit_split()


def build_rotate(shape: AttentionShape, unit: VectorUnit, table: RopeTable) -> PrimFunc:
    """Return ``rotate``: qkv with queries and keys rotated.

    Arguments: qkv (n, heads + 2 kv_heads, head_dim), positions int32 (n,), output like qkv.
    """
    return _Rope(shape, unit, table).emit_rotate()


class _Rope:
    def __init__(self, shape: AttentionShape, unit: VectorUnit, table: RopeTable) -> None:
        if table.rotary_dim > shape.head_dim:
            raise UnsupportedError(
                f"head_dim is {shape.head_dim}; rotary position embedding is to turn "
                f"{table.rotary_dim} elements of a head"
            )
        self.shape, self.unit, self.table = shape, unit, table
        self.half = len(table.frequencies)
        self.lanes = unit.dividing(self.half).lanes
        self.heads = (shape.heads, shape.kv_heads, shape.kv_heads)

    def emit_split(self) -> PrimFunc:
        shape = self.shape
        with IRBuilder() as ir, T.prim_func(s_tir=True):
            T.func_name("split_rotary")
            T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
            tokens = T.int32()

            def arg(name: str, count: int) -> Buffer:
                return T.arg(name, T.buffer((tokens, count, shape.head_dim), shape.dtype))

            qkv = arg("qkv", sum(self.heads))
            positions = T.arg("position_map", index_buffer(tokens))
            parts = [arg(name, count) for name, count in zip("qkv", self.heads, strict=True)]
            apply = T.arg("apply_rope", T.int64())
            self._each_token(qkv, positions, tokens, [(part, 0) for part in parts], apply)
        return ir.get()

    def emit_rotate(self) -> PrimFunc:
        with IRBuilder() as ir, T.prim_func(s_tir=True):
            T.func_name("rotate")
            T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
            tokens = T.int64()
            rows = (tokens, sum(self.heads), self.shape.head_dim)
            qkv = T.arg("qkv", T.buffer(rows, self.shape.dtype))
            positions = T.arg("positions", index_buffer(tokens))
            out = T.arg("out", T.buffer(rows, self.shape.dtype))
            firsts = (0, self.heads[0], self.heads[0] + self.heads[1])
            with T.sblock("root"):  # Relax expects one, see `elementwise_cpu`
                self._each_token(qkv, positions, tokens, [(out, first) for first in firsts])
        return ir.get().without_attr("global_symbol")

    def _each_token(
        self,
        qkv: Buffer,
        positions: Buffer,
        tokens: Expr,
        places: list[tuple[Buffer, int]],
        apply: Expr | None = None,
    ) -> None:
        """Write queries, keys and values to their places, each (buffer, first head).

        ``apply``, if there is one, is 0 where nothing is to turn.
        """

        def split(token: Expr) -> None:
            cos, sin = self._angles(T.cast(positions[token], "float32"), apply)
            first = 0
            for name, (part, place), count in zip("qkv", places, self.heads, strict=True):
                turned = 2 * self.half if name != "v" else 0
                with T.serial(0, count) as head:
                    source, target = (token, first + head), (token, place + head)
                    if turned:
                        with T.serial(0, self.half // self.lanes) as i:
                            at = T.bind(i * self.lanes)
                            self._rotate(qkv, source, part, target, at, cos, sin)
                    self._copy(qkv, source, part, target, turned)
                first += count

        parallel_tokens(tokens, split)

    def _angles(self, position: Expr, apply: Expr | None) -> tuple[Buffer, Buffer]:
        """Return cos and sin of a token's angles, with amplitude; without rope they are 1 and 0."""
        frequencies, cos, sin = (T.alloc_buffer((self.half,), "float32") for _ in range(3))
        for i, value in enumerate(self.table.frequencies):
            store(frequencies, i, T.float32(value))
        amplitude = T.float32(self.table.amplitude)
        if apply is not None:
            position = T.bind(T.if_then_else(apply > 0, position, T.float32(0)))
            amplitude = T.bind(T.if_then_else(apply > 0, amplitude, T.float32(1)))
        with T.serial(0, self.half) as i:
            angle = T.bind(position * frequencies[i])
            store(cos, i, amplitude * T.cos(angle))
            store(sin, i, amplitude * T.sin(angle))
        return cos, sin

    def _rotate(
        self,
        qkv: Buffer,
        source: tuple[Expr, Expr],
        part: Buffer,
        target: tuple[Expr, Expr],
        at: Expr,
        cos: Buffer,
        sin: Buffer,
    ) -> None:
        lanes = self.lanes
        x = T.bind(vec.load(qkv, (*source, at), lanes))
        y = T.bind(vec.load(qkv, (*source, at + self.half), lanes))
        c, s = T.bind(cos[span(at, lanes)]), T.bind(sin[span(at, lanes)])
        vec.save(part, (*target, at), x * c - y * s, lanes)
        vec.save(part, (*target, at + self.half), y * c + x * s, lanes)

    def _copy(
        self,
        qkv: Buffer,
        source: tuple[Expr, Expr],
        part: Buffer,
        target: tuple[Expr, Expr],
        first: int,
    ) -> None:
        """Copy the elements of a head from ``first`` on as they are."""
        count = self.shape.head_dim - first
        if count == 0:
            return
        lanes = math.gcd(self.unit.lanes, count, first)
        with T.serial(0, count // lanes) as i:
            place = span(first + i * lanes, lanes)
            store(part, (*target, place), qkv[(*source, place)])
