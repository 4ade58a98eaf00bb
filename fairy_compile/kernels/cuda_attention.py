"""Decode attention on CUDA: one query row a sequence and head, contexts cut into parts.

TVM's kernel gives a head to one block: with 32 heads, three quarters of a large GPU wait, and a
block walks the context 32 keys at a time, each step behind barriers. Here a context is cut into as
many parts as there are blocks to spare, and a second launch merges them; short contexts take one.
Pages before a layer's sliding window are in no part, and are not read. Where the cache is an
argument the same launch rotates queries and keys and appends the new ones.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from fairy_compile.kernels.attention_shape import LOG2_E, PAGE, AttentionShape
from fairy_compile.kernels.cuda_source import CUDA_TYPES, ROTATING, read_files

if TYPE_CHECKING:
    from tvm.tirx import PrimFunc

    from fairy_compile.op.rope import RopeTable

_WARPS = 8
# A part of a context is at least this many pages: as many keys as a block asks for at once.
_PART_PAGES = 16
_MOST_PARTS = 32
_BLOCKS = 264  # two for each multiprocessor of the largest GPU we know


def suffix(shape: AttentionShape) -> str:
    """Return what names of functions say of window and cap: ``_w4096_c50_0``."""
    window = "" if shape.window is None else f"_w{shape.window}"
    cap = "" if not shape.softcap else "_c" + re.sub(r"\W", "_", repr(float(shape.softcap)))
    return window + cap


def constants(shape: AttentionShape, **others: int) -> str:
    """Return the constants of a call in CUDA C++, those of the shape and ``others``."""
    values = {
        "kHeads": shape.heads,
        "kKvHeads": shape.kv_heads,
        "kHeadDim": shape.head_dim,
        "kWindow": shape.window or 0,
        **others,
    }
    lines = [f"  static constexpr int {key} = {n};" for key, n in values.items()]
    cap = LOG2_E * (shape.softcap or 0)
    return "\n".join([*lines, f"  static constexpr float kCap = {cap!r}f;"])


def window_arguments(shape: AttentionShape) -> tuple[str, str]:
    """Return (parameters, arguments) of a device function, which it needs for windows alone."""
    if shape.window is None:
        return "", "nullptr, nullptr, "
    return "const int* offsets, const int* positions, ", "offsets, positions, "


def _block_heads(shape: AttentionShape) -> int:
    """Return the query heads of a block: some that share keys, four at most."""
    return max(n for n in (1, 2, 3, 4) if shape.group % n == 0)


def serves(shape: AttentionShape) -> bool:
    """Tell whether a key is a power of two of 128-bit units, 32 at most."""
    if shape.dtype not in ("float16", "float32"):
        return False
    lanes, rest = divmod(shape.head_dim, 4 if shape.dtype == "float32" else 8)
    return rest == 0 and 0 < lanes <= 32 and lanes & (lanes - 1) == 0


def rotates(shape: AttentionShape, table: RopeTable, dtype: str) -> bool:
    """Tell whether the kernel can also rotate and append what a layer computes as ``dtype``."""
    partners = len(table.frequencies) % (4 if shape.dtype == "float32" else 8) == 0
    return serves(shape) and dtype == shape.dtype and partners


def render(shape: AttentionShape, table: RopeTable | None = None) -> tuple[str, str]:
    """Return (name, CUDA C++) of a device function and of ``combine_`` name; see attention.cuh.

    Args:
        shape: sizes and dtype.
        table: what it rotates by, see `build_decode`.
    """
    x = CUDA_TYPES[shape.dtype]
    library = read_files("primitives.cuh", "attention_scores.cuh", "attention.cuh")
    name = f"attention_{shape.heads}_{shape.kv_heads}_{shape.head_dim}_{shape.dtype}{suffix(shape)}"
    heads = _block_heads(shape)
    together = 4 if heads < 4 else 2
    parameters, arguments = window_arguments(shape)
    extra = ""
    if table is None:
        source_parameters = f"const {x}* q, const {x}* pages"
        make = f"fairy::Stored<{name}_call>{{q, pages}}"
    else:
        amplitude = re.sub(r"\W", "_", repr(table.amplitude))
        name = f"{ROTATING}{name}_r{table.rotary_dim}_{amplitude}"
        extra = (
            f"  static constexpr int kHalf = {len(table.frequencies)};\n"
            f"  static constexpr float kAmplitude = {table.amplitude!r}f;\n"
        )
        source_parameters = (
            f"const {x}* qkv, {x}* pages, const int* at, const int* places, "
            "const float* frequencies"
        )
        make = f"fairy::Rotating<{name}_call>{{qkv, pages, at, places, frequencies}}"
    source = f"""{library}
#ifndef FAIRY_{name}
#define FAIRY_{name}
struct {name}_call {{
  typedef {x} X;
{constants(shape, kGroup=heads, kWarps=_WARPS, kTogether=together)}
{extra}}};

__device__ __forceinline__ void {name}({source_parameters}, const int* indptr,
                                       const int* page_values, const int* last_page,
                                       {parameters}{x}* output, float* lse, float* partial,
                                       float* partial_lse, float scale, int parts) {{
  fairy::DecodeAttention<{name}_call>::run({make}, indptr, page_values, last_page,
                                           {arguments}output, lse, partial, partial_lse, scale,
                                           parts);
}}

__device__ __forceinline__ void combine_{name}(const float* partial, const float* partial_lse,
                                               {x}* output, float* lse, int parts) {{
  fairy::Combine<{name}_call>::run(partial, partial_lse, output, lse, parts);
}}
#endif  // FAIRY_{name}
"""
    return name, source


def build_decode(
    shape: AttentionShape, *, room: bool = False, table: RopeTable | None = None
) -> PrimFunc:
    """Return ``batch_decode_paged_kv`` as the runtime's KV cache calls it.

    Arguments: q (b, heads, head_dim), pages (p, 2, kv_heads, 16, head_dim), page_indptr int32
    (b + 1,), page_values int32, last_page_len int32 (b,), k_rope_pos_offset int32 (b,),
    q_rope_position int32 (b,), output like q, lse float32 (b, heads) in units of log2, rotary_mode,
    rope_scale, rope_theta, sm_scale. Rotary embedding inside the kernel (rotary_mode 1) is refused.

    Args:
        shape: sizes and dtype.
        room: take memory for parts of contexts as further outputs after lse, float32 (b
            times each of `part_sizes`,), as what becomes a CUDA graph must; else the function
            allocates it.
        table: rotate queries and keys, and append keys and values, see `rotates`. Instead of q it
            takes qkv (b, heads + 2 kv_heads, head_dim), and after q_rope_position places int32
            (b,), see `kernels.rotate_append`, and frequencies float32. Pages are written.
    """
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script import builder as T

    from fairy_compile.kernels.attention_cpu_decode import index_buffer, rope_and_scale_args

    name, source = render(shape, table)
    with IRBuilder() as ir, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        batch, count = T.int32(), T.int32()
        rows = (batch, shape.heads, shape.head_dim)
        if table is None:
            x = T.arg("q", T.buffer(rows, shape.dtype))
        else:
            every = shape.heads + 2 * shape.kv_heads
            x = T.arg("qkv", T.buffer((batch, every, shape.head_dim), shape.dtype))
        page = (2, shape.kv_heads, PAGE, shape.head_dim)
        pages = T.arg("pages", T.buffer((T.int32(), *page), shape.dtype))
        indptr = T.arg("page_indptr", index_buffer(batch + 1))
        page_values = T.arg("page_values", index_buffer(count))
        last_page = T.arg("last_page_len", index_buffer(batch))
        offset = T.arg("k_rope_pos_offset", index_buffer(batch))
        position = T.arg("q_rope_position", index_buffer(batch))
        given = [x.data, pages.data]
        if table is not None:
            places = T.arg("places", index_buffer(batch))
            half = len(table.frequencies)
            frequencies = T.arg("frequencies", T.buffer((half,), "float32"))
            given += [T.address_of(position[0]), T.address_of(places[0]), frequencies.data]
        output = T.arg("output", T.buffer(rows, shape.dtype))
        lse = T.arg("lse", T.buffer((batch, shape.heads), "float32"))
        part_buffers = [
            T.arg(f"parts_{i}", T.buffer((batch * size,), "float32"))
            for i, size in enumerate(part_sizes(shape) if room else ())
        ]
        sm_scale = rope_and_scale_args()
        scale = sm_scale * T.float32(shape.score_unit)
        tables = [indptr, page_values, last_page]
        if shape.window is not None:
            tables += [offset, position]
        given += [T.address_of(b[0]) for b in tables]
        parts = T.bind(_parts(shape, batch, _most_seen(shape, count, sm_scale)))
        results = [output.data, lse.data]
        partials = [buffer.data for buffer in part_buffers or _allocate(shape, batch, parts)]
        _launch(
            name,
            source,
            {
                "blockIdx.x": parts,
                "blockIdx.y": shape.heads // _block_heads(shape),
                "blockIdx.z": batch,
            },
            [*given, *results, *partials, scale, parts],
        )
        with T.If(parts > 1), T.Then():
            extents = {"blockIdx.x": shape.heads, "blockIdx.y": batch}
            _launch(f"combine_{name}", source, extents, [*partials, *results, parts])
    return ir.get()


def part_sizes(shape: AttentionShape) -> tuple[int, ...]:
    """Return how many elements results of all parts of a context take, by array."""
    blocks = shape.heads // _block_heads(shape)
    parts = shape.heads * min(_MOST_PARTS, -(-_BLOCKS // blocks))
    return parts * shape.head_dim, parts


def _allocate(shape: AttentionShape, batch: Any, parts: Any) -> list[Any]:
    """Allocate that memory for one call."""
    from tvm.tirx.script import builder as T

    room = batch * shape.heads * parts
    sizes = (room * shape.head_dim, room)
    return [T.alloc_buffer((size,), "float32", scope="global") for size in sizes]


def _most_seen(shape: AttentionShape, pages: Any, sm_scale: Any) -> Any:
    """Return how many of all ``pages`` one query sees at most."""
    from tvm.tirx.script import builder as T

    if shape.window is None:
        return pages
    # The window's last key at the start of a page, its others in as many as they touch.
    touched = 1 + -(-(shape.window - 1) // PAGE)
    return T.if_then_else(sm_scale < T.float32(0), T.min(pages, T.int32(touched)), pages)


def _parts(shape: AttentionShape, batch: Any, pages: Any) -> Any:
    """Return how many parts each context is cut into, of which a query sees ``pages`` at most."""
    from tvm.tirx.script import builder as T

    blocks = batch * (shape.heads // _block_heads(shape))
    wanted = T.min(
        T.truncdiv(pages + (_PART_PAGES - 1), T.int32(_PART_PAGES)),
        T.truncdiv(T.int32(_BLOCKS) + blocks - 1, blocks),
    )
    return T.max(T.min(wanted, T.int32(_MOST_PARTS)), T.int32(1))


def _launch(name: str, source: str, extents: dict[str, Any], arguments: list[Any]) -> None:
    from contextlib import ExitStack

    from tvm.backend.cuda.op import cuda_func_call
    from tvm.tirx.script import builder as T

    with ExitStack() as stack:
        for tag, extent in {**extents, "threadIdx.x": 32 * _WARPS}.items():
            stack.enter_context(T.thread_binding(0, extent, tag))
        T.evaluate(cuda_func_call(name, *arguments, source_code=source))
