"""Attention with sliding windows and capped scores over a paged cache, and what it must give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from fairy_compile.kernels import attention_gpu_decode, attention_gpu_prefill
from fairy_compile.kernels.attention_shape import EMPTY, PAGE, AttentionShape
from fairy_compile.targets import Target
from tests.emulation.gpu_cases import compile_functions

BUILD = {
    "decode": attention_gpu_decode.build_decode,
    "paged": attention_gpu_prefill.build_paged_prefill,
    "ragged": attention_gpu_prefill.build_ragged_prefill,
}


@dataclass(frozen=True)
class Sequences:
    """Sequences of one call.

    Attributes:
        keys: how many each has.
        queries: likewise.
        offsets: position of each one's first key.
        behind: how many tokens after the last key, if not its own, the first query is.
    """

    keys: Sequence[int]
    queries: Sequence[int]
    offsets: Sequence[int]
    behind: int | None = None

    def positions(self) -> list[np.ndarray]:
        """Return the positions of each one's queries: those of the last keys, or behind them."""
        rows = zip(self.keys, self.queries, self.offsets, strict=True)
        first = -1 if self.behind is None else self.behind
        return [
            offset + keys + np.arange(n) + (first if self.behind is not None else -n)
            for keys, n, offset in rows
        ]


def reference(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    seen: np.ndarray,
    softcap: float | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return attention of q (n, heads, d) over keys (m, kv_heads, d), and its log2-sum, in float64.

    ``seen`` (n, m) says what is seen of what; rows that see nothing give 0 and `EMPTY`.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x.astype(np.float64), group, axis=1) for x in (k, v))
    scores = np.einsum("qhd,khd->qhk", q.astype(np.float64), k) / math.sqrt(q.shape[2])
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    weights = np.where(seen[:, None], np.exp(scores), 0)
    total = weights.sum(axis=2)
    nothing = total == 0
    out = np.einsum("qhk,khd->qhd", weights, v) / np.where(nothing, 1, total)[:, :, None]
    return out, np.where(nothing, EMPTY, np.log2(np.where(nothing, 1, total)))


def sees(sequences: Sequences, s: int, causal: bool, window: int | None) -> np.ndarray:
    """Return which keys the queries of a sequence see."""
    keys, n = sequences.keys[s], sequences.queries[s]
    at = sequences.positions()[s][:, None]
    key = sequences.offsets[s] + np.arange(keys)
    seen = np.ones((n, keys), bool)
    if causal:
        seen &= np.arange(keys) <= np.arange(n)[:, None] + keys - n
    if window is not None:
        seen &= key > at - window
    return seen


class Device:
    """The kernels of a shape on a device."""

    def __init__(self, shape: AttentionShape, target: Target, directory: Path) -> None:
        self.shape, self.device = shape, tvm.runtime.device(target.device)
        functions = {name: build(shape) for name, build in BUILD.items()}
        self.library = compile_functions(functions, target, directory)

    def error(self, name: str, sequences: Sequences, *, local: bool, causal: bool = False) -> float:
        """Run a kernel; return its largest error in tolerances, infinite where it wrote nothing.

        Rounded to float16, outputs below 8 are off by at most 2^-9. In float32, errors of a score
        are those of d products of size d^-1/2, each off by up to 2^-24 of their sum: 16 * 2^-24 for
        d = 256, ten times less than allowed. A cap's hyperbolic tangent is a difference from 1 of
        numbers of that size, of three roundings and an exponential: its errors, of up to 8 2^-24,
        are multiplied by the cap, and moving all scores of a row by e moves the log-sum-exp by e,
        moving each its own way changes outputs, which are below 8, by up to 2 e of 8.
        """
        shape, rng = self.shape, np.random.default_rng(0)
        made = [
            rng.standard_normal((2, n, shape.kv_heads, shape.head_dim)).astype(shape.dtype)
            for n in sequences.keys
        ]
        rows = np.cumsum([0, *sequences.queries]).astype(np.int32)
        q = rng.standard_normal((rows[-1], shape.heads, shape.head_dim)).astype(shape.dtype)
        out, lse = np.full_like(q, np.nan), np.full(q.shape[:2], np.nan, np.float32)
        positions = np.concatenate(sequences.positions()).astype(np.int32)
        offsets = np.array(sequences.offsets, np.int32)
        window = shape.window if local else None
        if name == "ragged":
            indptr = np.cumsum([0, *sequences.keys]).astype(np.int32)
            k, v = (np.concatenate([x[i] for x in made]) for i in (0, 1))
            args = [q, rows, k, v, indptr, positions, offsets]
        else:
            cache = self._pages(made, sequences, window, rng)
            args = [q, *([rows] if name == "paged" else []), *cache, offsets, positions]
        scale = shape.head_dim**-0.5 * (-1 if local else 1)
        flags = [] if name == "decode" else [int(causal)]
        tensors = [tvm.runtime.tensor(a, self.device) for a in (*args, out, lse)]
        self.library[name](*tensors, *flags, 0, 1.0, 1e4, scale)
        got, got_lse = (t.numpy().astype(np.float64) for t in tensors[-2:])
        of_cap = 8 * 2**-24 * (shape.softcap or 0)
        bound = (2**-9 if shape.dtype == "float16" else 1e-5) + 16 * of_cap
        lse_bound = 1e-5 + of_cap * math.log2(math.e)
        worst = 0.0
        for s in range(len(made)):
            seen = sees(sequences, s, causal or name == "decode", window)
            own = slice(rows[s], rows[s + 1])
            want, want_lse = reference(q[own], *made[s], seen, shape.softcap)
            if not want.size:
                continue
            errors = [np.abs(got[own] - want).max() / bound]
            empty = want_lse == EMPTY
            if not np.array_equal(empty, got_lse[own] == np.float32(EMPTY)):
                return math.inf
            errors.append(np.abs(got_lse[own] - want_lse)[~empty].max(initial=0) / lse_bound)
            worst = max(worst, *np.nan_to_num(errors, nan=np.inf))
        return worst

    def _pages(
        self, made: list[np.ndarray], sequences: Sequences, window: int | None, rng: Any
    ) -> list[np.ndarray]:
        """Return (pages, indptr, page_values, last_page_len), pages in no order.

        What pages hold past a sequence's end is finite, as in a cache that was written before.
        Whole pages that no query sees hold no numbers, so that results tell whether they were read.
        """
        shape = self.shape
        indptr = np.cumsum([0, *(-(-n // PAGE) for n in sequences.keys)]).astype(np.int32)
        count = int(indptr[-1])
        values = rng.permutation(count + 2)[:count].astype(np.int32)
        pages = rng.standard_normal((count + 2, 2, shape.kv_heads, PAGE, shape.head_dim))
        pages = pages.astype(shape.dtype)
        for s, rows in enumerate(made):
            for i in range(rows.shape[1]):
                pages[values[indptr[s] + i // PAGE], :, :, i % PAGE] = rows[:, i]
            if window is not None and sequences.queries[s] == 1:
                first = int(sequences.positions()[s][0]) - window + 1 - sequences.offsets[s]
                for page in range(min(max(first, 0), sequences.keys[s]) // PAGE):
                    pages[values[indptr[s] + page]] = np.nan
        last = np.array([(n - 1) % PAGE + 1 for n in sequences.keys], np.int32)
        return [pages, indptr, values, last]


def without_window(shape: AttentionShape) -> AttentionShape:
    """Return a shape of which no layer has a window."""
    return replace(shape, window=None)
