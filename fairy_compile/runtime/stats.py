"""`Stats`: what a model has run, how often and how fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fairy_compile.artifact.contract import (
    BATCH_DECODE_PAGES,
    DECODE_PAGES,
    EXACT_DECODE,
    PREFILL_PAGES,
)
from fairy_compile.runtime.engine import Engine
from fairy_compile.runtime.pages import PAGE_SIZE

if TYPE_CHECKING:
    from fairy_compile.artifact.manifest import LayerEntry

_FORWARD = {
    "prefill": "many",
    "batch_prefill": "many",
    "decode": "single",
    "batch_decode": "many",
    EXACT_DECODE: "decode",
    PREFILL_PAGES: "many",
    DECODE_PAGES: "single",
    BATCH_DECODE_PAGES: "many",
}
"""Function that runs all layers once -> batch class its kernels were generated for."""


@dataclass(frozen=True)
class FunctionStats:
    """Calls, tokens and wall-clock seconds of one library function."""

    name: str
    calls: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class KernelStats:
    """How often a kernel family ran.

    Attributes:
        kernel: e.g. ``x86.codebook``, or ``dense``.
        batch: ``single`` for one row (decode), ``many`` for a symbolic number of rows, ``decode``
            for rows computed as if each were alone.
        layers: linear calls of the model that use it; each runs once per step.
        calls: layers times the steps of that batch class.
    """

    kernel: str
    batch: str
    layers: int
    calls: int


@dataclass(frozen=True)
class Stats:
    """A snapshot of what a model has run since it was loaded.

    ``kernels`` follows from the build report and the counted calls of library functions;
    `Model.trace_kernels` measures it.

    Attributes:
        device: TVM device name.
        threads: CPU threads of the kernels.
        functions: by library function.
        kernels: by kernel family and batch class.
        prefill_tokens: prompt tokens run.
        prefill_tokens_per_second: their rate.
        decode_tokens: tokens run one at a time a sequence.
        decode_tokens_per_second: their rate, over all sequences.
        kv_bytes_used: size of the KV cache pages that hold tokens now.
        kv_bytes_peak: the most there were.
        kv_bytes_total: size of all pages.
        sequences: running sequences.
    """

    device: str
    threads: int
    functions: tuple[FunctionStats, ...]
    kernels: tuple[KernelStats, ...]
    prefill_tokens: int
    prefill_tokens_per_second: float
    decode_tokens: int
    decode_tokens_per_second: float
    kv_bytes_used: int
    kv_bytes_peak: int
    kv_bytes_total: int
    sequences: int

    def to_json(self) -> dict[str, Any]:
        """Return plain dictionaries and lists."""
        return asdict(self)

    def summary(self) -> str:
        """Return one line: rates, KV cache, and which kernels ran."""
        kernels = ", ".join(f"{k.kernel} ({k.batch}) {k.calls}x" for k in self.kernels if k.calls)
        return (
            f"prefill {self.prefill_tokens} tokens at {self.prefill_tokens_per_second:.1f} tok/s, "
            f"decode {self.decode_tokens} tokens at {self.decode_tokens_per_second:.1f} tok/s, "
            f"KV cache {self.kv_bytes_peak / 1e6:.2f} MB at most of "
            f"{self.kv_bytes_total / 1e6:.2f} MB, "
            f"{self.threads} thread{'s' if self.threads > 1 else ''} on {self.device}"
            + (f"; kernels: {kernels}" if kernels else "")
        )


def collect(engine: Engine, layers: Sequence[LayerEntry]) -> Stats:
    """Return the `Stats` of ``engine``, whose model has the linear calls ``layers``."""
    page_bytes = kv_bytes_per_token(engine) * PAGE_SIZE
    return Stats(
        device=str(engine.device),
        threads=engine.threads,
        functions=tuple(
            FunctionStats(name, count.calls, count.tokens, count.seconds)
            for name, count in engine.counts.items()
        ),
        kernels=_kernels(engine, layers),
        prefill_tokens=engine.prefill_phase.tokens,
        prefill_tokens_per_second=engine.prefill_phase.tokens_per_second,
        decode_tokens=engine.decode_phase.tokens,
        decode_tokens_per_second=engine.decode_phase.tokens_per_second,
        kv_bytes_used=engine.cache.used_pages * page_bytes,
        kv_bytes_peak=engine.cache.peak_pages * page_bytes,
        kv_bytes_total=engine.cache.pages * page_bytes,
        sequences=len(engine.cache.sequences),
    )


def kv_bytes_per_token(engine: Engine) -> int:
    """Return the bytes of one token's keys and values, stored in the activation dtype."""
    sizes = engine.metadata["kv_cache"]
    item = engine.activation_bytes
    return 2 * sizes["num_hidden_layers"] * sizes["num_key_value_heads"] * sizes["head_dim"] * item


def _kernels(engine: Engine, layers: Sequence[LayerEntry]) -> tuple[KernelStats, ...]:
    per_kernel: dict[str, int] = {}
    for layer in layers:
        per_kernel[layer.kernel] = per_kernel.get(layer.kernel, 0) + 1
    steps = {"single": 0, "many": 0}
    for function, batch in _FORWARD.items():
        if function in engine.counts:
            steps[batch] = steps.get(batch, 0) + engine.counts[function].calls
    return tuple(
        KernelStats(kernel, batch, count, count * steps[batch])
        for kernel, count in sorted(per_kernel.items())
        for batch in steps
    )
