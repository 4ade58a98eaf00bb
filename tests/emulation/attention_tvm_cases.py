"""TVM's attention kernels for GPUs, as models get them, and what they must give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax

from fairy_compile.kernels.attention_shape import PAGE
from fairy_compile.models.config import DecoderConfig, parse_decoder
from fairy_compile.models.kv_cache_gpu import gpu_functions
from fairy_compile.targets import Target
from tests.emulation.gpu_cases import compile_functions

# Of one key, within a page, of whole tiles, and of several with a rest.
LENGTHS = (1, 9, 32, 47)
DECODE, PAGED, RAGGED = (
    "tir_attention_decode", "tir_attention_prefill", "tir_attention_prefill_ragged",
)  # fmt: skip


def config_of(heads: int, kv_heads: int, head_dim: int, dtype: str) -> DecoderConfig:
    """Return the sizes of a model with these heads and a cache in ``dtype``."""
    sizes = {
        "model_type": "llama",
        "hidden_size": heads * head_dim,
        "head_dim": head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": 1,
        "intermediate_size": 64,
        "vocab_size": 64,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
    }
    return parse_decoder(sizes, kv_dtype=dtype, act_dtype=dtype)


def attention_functions(config: DecoderConfig, target: Target) -> dict[str, Any]:
    """Return name -> kernel of a model's cache."""
    bb = relax.BlockBuilder()
    gpu_functions(bb, config, target)
    functions = bb.get().functions_items()
    return {v.name_hint: f for v, f in functions if isinstance(f, tvm.tirx.PrimFunc)}


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return attention of q (heads, d) over the first keys (n, kv_heads, d), and its log2-sum."""
    group = q.shape[0] // k.shape[1]
    k, v = (np.repeat(x[:length].astype(np.float64), group, axis=1) for x in (k, v))
    scores = np.einsum("hd,nhd->hn", q.astype(np.float64), k) / math.sqrt(q.shape[1])
    weights = np.exp(scores)
    total = weights.sum(axis=1, keepdims=True)
    return np.einsum("hn,nhd->hd", weights / total, v), np.log2(total)[:, 0]


class Cases:
    """A cache with sequences of `LENGTHS`, and the kernels over it on a device.

    Args:
        names: of the kernels to compile: `DECODE`, `PAGED`, `RAGGED`.
    """

    def __init__(
        self, config: DecoderConfig, target: Target, names: Sequence[str], directory: Path
    ) -> None:
        self.config, self.device = config, tvm.runtime.device(target.device)
        functions = attention_functions(config, target)
        self.library = compile_functions({n: functions[n] for n in names}, target, directory)
        rng = np.random.default_rng(0)
        kv_heads, head_dim = config.num_kv_heads, config.head_dim
        self.k, self.v = (
            [self.random(rng, n, kv_heads, head_dim) for n in LENGTHS] for _ in range(2)
        )
        needed = [-(-n // PAGE) for n in LENGTHS]
        self.indptr = np.cumsum([0, *needed]).astype(np.int32)
        count = int(self.indptr[-1])
        self.pages_of = rng.permutation(count + 2)[:count].astype(np.int32)
        # What pages hold past a sequence's end is finite, as in a cache that was written before.
        self.pages = self.random(rng, count + 2, 2, kv_heads, PAGE, head_dim)
        self.last = np.array([(n - 1) % PAGE + 1 for n in LENGTHS], np.int32)
        for s, n in enumerate(LENGTHS):
            for i in range(n):
                page = self.pages_of[self.indptr[s] + i // PAGE]
                self.pages[page, 0, :, i % PAGE] = self.k[s][i]
                self.pages[page, 1, :, i % PAGE] = self.v[s][i]
        self.rows = np.cumsum([0, *LENGTHS]).astype(np.int32)
        self.q = self.random(rng, int(self.rows[-1]), config.num_heads, head_dim)

    def random(self, rng: np.random.Generator, *shape: int) -> np.ndarray:
        """Return values of the cache's dtype."""
        return rng.standard_normal(shape).astype(self.config.kv_dtype)

    def error(self, name: str, causal: int = 0) -> float:
        """Run a kernel; return its largest error in tolerances, infinite where it wrote nothing.

        Rounded to float16, outputs below 8 are off by at most 2^-9. In float32, errors of a score
        are those of d products of size d^-1/2, each off by up to 2^-24 of their sum: 16 * 2^-24 for
        d = 256, ten times less than allowed.
        """
        q = self.q if name != DECODE else self.q[: len(LENGTHS)]
        out, lse = np.full_like(q, np.nan), np.full(q.shape[:2], np.nan, np.float32)
        zero, positions = np.zeros(len(LENGTHS), np.int32), np.zeros(len(q), np.int32)
        cache = (self.pages, self.indptr, self.pages_of, self.last, zero)
        scale = (0, 1.0, 1e4, self.config.head_dim**-0.5)  # rotary embedding happened before
        if name == DECODE:
            got = self._call(name, q, *cache, zero, out, lse, *scale)[-6:-4]
        elif name == PAGED:
            got = self._call(name, q, self.rows, *cache, positions, out, lse, causal, *scale)[-7:-5]
        else:
            keys, values = np.concatenate(self.k), np.concatenate(self.v)
            arrays = (q, self.rows, keys, values, self.rows, positions, zero, out, lse)
            got = self._call(name, *arrays, causal, *scale)[-7:-5]
        want = [
            attention(q[s if name == DECODE else self.rows[s] + i], self.k[s], self.v[s], length)
            for s, n in enumerate(LENGTHS)
            for i, length in enumerate(self._lengths(name, n, causal))
        ]
        bound = 2**-9 if self.config.kv_dtype == "float16" else 1e-5
        errors = [
            float(np.abs(got[0] - np.stack([o for o, _ in want])).max()) / bound,
            float(np.abs(got[1] - np.stack([s for _, s in want])).max()) / 1e-5,
        ]
        return max(np.nan_to_num(errors, nan=np.inf))

    @staticmethod
    def _lengths(name: str, n: int, causal: int) -> list[int]:
        if name == DECODE:
            return [n]
        return [i + 1 if causal else n for i in range(n)]

    def _call(self, name: str, *args: Any) -> list[Any]:
        tensors = [
            tvm.runtime.tensor(a, self.device) if isinstance(a, np.ndarray) else a for a in args
        ]
        self.library[name](*tensors)
        return [t.numpy() if isinstance(t, tvm.runtime.Tensor) else t for t in tensors]
