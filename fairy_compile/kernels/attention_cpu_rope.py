"""Rotary position embedding on CPUs: splits fused query, key and value rows and rotates two."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from fairy_compile.errors import UnsupportedError
from fairy_compile.kernels import attention_cpu_vector as vec
from fairy_compile.kernels.attention_cpu_decode import index_buffer
from fairy_compile.kernels.attention_cpu_pages import parallel_tokens
from fairy_compile.kernels.attention_cpu_tile import AttentionShape
from fairy_compile.kernels.attention_cpu_vector import VectorUnit, span, store

if TYPE_CHECKING:
    from tvm.ir import Expr
    from tvm.tirx import Buffer, PrimFunc


def rope_frequencies(
    head_dim: int, theta: float, scale: float = 1.0, scaling: Mapping[str, Any] | None = None
) -> np.ndarray:
    """Return the angle per position of each pair of elements, float32 (head_dim / 2,).

    theta^(-2i / head_dim) * scale (Su et al., arXiv 2104.09864); with ``scaling`` of rope_type
    ``llama3``, wavelengths between original_max_position_embeddings / high_freq_factor and
    .../ low_freq_factor fade from unscaled to divided by ``factor`` (as Llama 3.1's checkpoints
    define it).
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / np.float32(theta) ** exponents).astype(np.float32)
    scaling = scaling or {}
    if scaling.get("rope_type") == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = frequencies * (keep + (1 - keep) / scaling["factor"])
    elif scaling:
        raise ValueError(f"rope scaling {dict(scaling)!r} is not one of: llama3")
    return (frequencies * scale).astype(np.float32)


def build_rope(shape: AttentionShape, unit: VectorUnit, frequencies: np.ndarray) -> PrimFunc:
    """Return ``fused_rope``: splits qkv and rotates queries and keys.

    Arguments: qkv (n, heads + 2 kv_heads, head_dim), position_map int32 (n,), q (n, heads,
    head_dim), k and v (n, kv_heads, head_dim), apply_rope int64. Elements i and i + head_dim / 2
    of a head are a pair, turned by position * frequencies[i].

    Raises:
        UnsupportedError: head_dim is odd, so that its elements form no pairs.
    """
    if shape.head_dim % 2:
        raise UnsupportedError(
            f"head_dim is {shape.head_dim}; rotary position embedding needs an even one"
        )
    return _Rope(shape, unit, frequencies).emit()


class _Rope:
    def __init__(self, shape: AttentionShape, unit: VectorUnit, frequencies: np.ndarray) -> None:
        self.shape, self.frequencies = shape, frequencies
        self.half = shape.head_dim // 2
        self.lanes = unit.dividing(self.half).lanes

    def emit(self) -> PrimFunc:
        shape = self.shape
        with IRBuilder() as ir, T.prim_func(s_tir=True):
            T.func_name("split_rotary")
            T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
            tokens = T.int32()
            heads = (shape.heads, shape.kv_heads, shape.kv_heads)

            def arg(name: str, count: int) -> Buffer:
                return T.arg(name, T.buffer((tokens, count, shape.head_dim), shape.dtype))

            qkv = arg("qkv", sum(heads))
            positions = T.arg("position_map", index_buffer(tokens))
            parts = [arg(name, count) for name, count in zip("qkv", heads, strict=True)]
            self.apply = T.arg("apply_rope", T.int64())

            def split(token: Expr) -> None:
                cos, sin = self._angles(T.cast(positions[token], "float32"))
                first = 0
                for name, part, count in zip("qkv", parts, heads, strict=True):
                    with T.serial(0, count) as head, T.serial(0, self.half // self.lanes) as i:
                        at = T.bind(i * self.lanes)
                        source, target = (token, first + head), (token, head)
                        if name == "v":
                            self._copy(qkv, source, part, target, at)
                        else:
                            self._rotate(qkv, source, part, target, at, cos, sin)
                    first += count

            parallel_tokens(tokens, split)
        return ir.get()

    def _angles(self, position: Expr) -> tuple[Buffer, Buffer]:
        """Return cos and sin of a token's angles; without rope they are 1 and 0."""
        frequencies, cos, sin = (T.alloc_buffer((self.half,), "float32") for _ in range(3))
        for i, value in enumerate(self.frequencies):
            store(frequencies, i, T.float32(float(value)))
        position = T.bind(T.if_then_else(self.apply > 0, position, T.float32(0)))
        with T.serial(0, self.half) as i:
            angle = T.bind(position * frequencies[i])
            store(cos, i, T.cos(angle))
            store(sin, i, T.sin(angle))
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
        at: Expr,
    ) -> None:
        for first in (at, at + self.half):
            place = span(first, self.lanes)
            store(part, (*target, place), qkv[(*source, place)])
