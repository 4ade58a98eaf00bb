"""Attention over the paged KV cache on CPUs: the functions the runtime's cache is made of.

Signatures and meaning are those of `vm.builtin.paged_attention_kv_cache_create`; the page layout is
the runtime's too: pages[page, 0 = key or 1 = value, kv head, row of 16, element]. Log-sum-exps are
in units of log2.
"""

from fairy_compile.kernels.attention_cpu_decode import build_decode
from fairy_compile.kernels.attention_cpu_pages import (
    build_append,
    build_compact,
    build_copy_page,
    build_merge,
    build_read,
)
from fairy_compile.kernels.attention_cpu_prefill import build_paged_prefill, build_ragged_prefill
from fairy_compile.kernels.attention_cpu_rope import build_rope, build_rotate
from fairy_compile.kernels.attention_cpu_vector import VectorUnit, vector_unit
from fairy_compile.kernels.attention_shape import AttentionShape

__all__ = [
    "AttentionShape",
    "VectorUnit",
    "build_append",
    "build_compact",
    "build_copy_page",
    "build_decode",
    "build_merge",
    "build_paged_prefill",
    "build_ragged_prefill",
    "build_read",
    "build_rope",
    "build_rotate",
    "vector_unit",
]
