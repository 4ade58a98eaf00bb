"""A KV cache whose pages and tables are arguments, so that a decode step is a single CUDA graph.

The runtime's own cache (`models.kv_cache`) hides its pages: attention is a call into the runtime,
which no recorded graph contains, and whose arguments change with every page. Here the pages of all
layers and the tables that say which pages a sequence has are tensors like any other. The caller
keeps them at one place (`runtime.steps`), so that launches recorded once stay right while
contents change. MLC's engine has no such cache, so a library has these functions besides its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvm import relax, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from fairy_compile.artifact.contract import (
    ALLOC_PAGES,
    BATCH_DECODE_PAGES,
    DECODE_PAGES,
    PREFILL_PAGES,
)
from fairy_compile.kernels import (
    attention_gpu_decode,
    attention_gpu_prefill,
    cuda_attention,
    cuda_attention_prefill,
)
from fairy_compile.kernels.attention_shape import PAGE, AttentionShape
from fairy_compile.kernels.rotate_append import build_rotate_append
from fairy_compile.models.shapes import product

if TYPE_CHECKING:
    from fairy_compile.models.config import DecoderConfig
    from fairy_compile.op.rope import RopeTable


@dataclass(frozen=True)
class PageTables:
    """The cache of one call, of n rows of b sequences; all arrays but pages are int32.

    Attributes:
        positions: (n,), of each row in its sequence.
        places: (n,), where its key goes: 16 times the page, plus the slot.
        indptr: (b + 1,), where the pages of each sequence begin in ``values``.
        values: pages of all sequences, the new rows' included; more may follow, which no sequence
            has. Their number bounds that of the pages of a sequence.
        last_page: (b,), keys in the last page of each sequence, those of the new rows included.
        offsets: (b,), zeros: position of each sequence's first key.
        rows: (b + 1,), where the rows of each sequence begin; None where each has one.
        pages: (pages, 2, kv_heads, 16, head_dim) in the dtype of the cache, one array a layer.
    """

    positions: Tensor
    places: Tensor
    indptr: Tensor
    values: Tensor
    last_page: Tensor
    offsets: Tensor
    rows: Tensor | None
    pages: list[Tensor]

    def attend(self, layer: int, qkv: Tensor, scale: float, config: DecoderConfig) -> Tensor:
        """Append new keys and values, and attend; see `models.kv_cache.attend`.

        Args:
            layer: which layer's pages.
            qkv: ``config.act_dtype`` (b, s, heads + 2 kv_heads, head_dim).
            scale: of scores; negative where the layer has the sliding window.
            config: sizes of the model.

        Returns:
            ``config.act_dtype`` (b, s, heads, head_dim).
        """
        *lead, every, head_dim = qkv.shape
        shape, n = config.attention_shape, product(lead)
        table = config.rope_table(layer)
        x = op.reshape(qkv, (n, every, head_dim))
        outputs = [
            Tensor.placeholder((n, shape.heads, head_dim), shape.dtype),
            Tensor.placeholder((n, shape.heads), "float32"),
        ]
        if self.rows is not None:
            kernel = _prefill_kernels(shape).build_paged_prefill(shape)
            arguments = [self._append(layer, x, shape, table), self.rows, *self._where(layer)]
        else:
            kernels = _decode_kernels(shape)
            outputs += [
                Tensor.placeholder((n * size,), "float32") for size in kernels.part_sizes(shape)
            ]
            if kernels is cuda_attention and cuda_attention.rotates(shape, table, x.dtype):
                kernel = cuda_attention.build_decode(shape, room=True, table=table)
                frequencies = Tensor.from_const(table.array())
                arguments = [x, *self._where(layer), self.places, frequencies]
            else:
                kernel = kernels.build_decode(shape, room=True)
                arguments = [self._append(layer, x, shape, table), *self._where(layer)]
        kernel = _private(_bind_scalars(kernel, scale))
        y = op.tensor_ir_op(kernel, "attention_pages", arguments, outputs)[0]
        y = op.reshape(y, (*lead, shape.heads, head_dim))
        return y if y.dtype == qkv.dtype else y.astype(qkv.dtype)

    def _append(self, layer: int, x: Tensor, shape: AttentionShape, table: RopeTable) -> Tensor:
        """Rotate and append x (n, heads + 2 kv_heads, head_dim); return the queries."""
        frequencies = Tensor.from_const(table.array())
        return op.tensor_ir_op(
            _private(build_rotate_append(shape, table, x.dtype)),
            "rotate_append",
            [x, self.positions, self.places, frequencies, self.pages[layer]],
            Tensor.placeholder((x.shape[0], shape.heads, shape.head_dim), shape.dtype),
        )

    def _where(self, layer: int) -> list[Tensor]:
        """Return what attention kernels take after their queries."""
        tables = [self.indptr, self.values, self.last_page, self.offsets, self.positions]
        return [self.pages[layer], *tables]


def serves(shape: AttentionShape) -> bool:
    """Tell whether there are kernels for such a cache."""
    return all(
        kernels.serves(shape) for kernels in (_decode_kernels(shape), _prefill_kernels(shape))
    )


def _decode_kernels(shape: AttentionShape) -> Any:
    return cuda_attention if cuda_attention.serves(shape) else attention_gpu_decode


def _prefill_kernels(shape: AttentionShape) -> Any:
    return cuda_attention_prefill if cuda_attention_prefill.serves(shape) else attention_gpu_prefill


def _private(kernel: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return a kernel as a function of the module alone, of which there may be several."""
    return kernel.without_attr("global_symbol").with_attr("op_pattern", 8)  # as it is


def _bind_scalars(kernel: tirx.PrimFunc, scale: float) -> tirx.PrimFunc:
    """Return a kernel of the runtime's cache with its arguments after the arrays as constants."""
    values = {
        "causal": tirx.const(1, "int32"),
        "rotary_mode": tirx.const(0, "int32"),
        "rope_scale": tirx.const(1.0, "float32"),
        "rope_theta": tirx.const(1.0, "float32"),
        "sm_scale": tirx.const(scale, "float32"),
    }
    return kernel.specialize({p: values[p.name] for p in kernel.params if p.name in values})


def page_specs(config: DecoderConfig) -> dict[str, dict[str, Any]]:
    """Return what arguments the functions of `PAGE_FUNCTIONS` take, as frontends say it.

    They are tokens int32 (n,), for prefill the rows that get logits, and the arrays of `PageTables`
    in its order.
    """
    spec = nn.spec
    shape = config.attention_shape
    page = (2, shape.kv_heads, PAGE, shape.head_dim)
    pages = [spec.Tensor(["pages", *page], shape.dtype) for _ in range(config.num_layers)]

    def ints(size: Any) -> Any:
        return spec.Tensor([size], "int32")

    def arguments(rows: Any, batch: Any, ends: Any, *, prefill: bool = False) -> dict[str, Any]:
        more = {"logit_positions": ints("logit_rows"), "rows": ints("ends")} if prefill else {}
        return {
            "ids": ints(rows),
            "positions": ints(rows),
            "places": ints(rows),
            "indptr": ints(ends),
            "values": ints("table_pages"),
            "last_page": ints(batch),
            "offsets": ints(batch),
            **more,
            "pages": pages,
            "$": {"param_mode": "packed", "effect_mode": "none"},
        }

    return {
        PREFILL_PAGES: arguments("seq_len", "batch_size", "ends", prefill=True),
        DECODE_PAGES: arguments(1, 1, 2),
        BATCH_DECODE_PAGES: arguments("batch_size", "batch_size", "ends"),
    }


def add_alloc_pages(bb: relax.BlockBuilder, config: DecoderConfig) -> None:
    """Add ``alloc_pages(number of pages) -> one array a layer``, see `PageTables`."""
    shape = config.attention_shape
    pages = tirx.Var("pages", "int64")
    with bb.function(ALLOC_PAGES, params=[relax.Var("count", relax.ShapeType([pages]))]):
        size = relax.ShapeExpr([pages, 2, shape.kv_heads, PAGE, shape.head_dim])
        arrays = [
            bb.emit(relax.op.builtin.alloc_tensor(size, shape.dtype, 0))
            for _ in range(config.num_layers)
        ]
        bb.emit_func_output(relax.Tuple(arrays))
