"""A fixed result, for tests of what is made from it."""

from fairy_compile.bench.kernels import KernelTime
from fairy_compile.bench.machine import Machine
from fairy_compile.bench.result import (
    BenchResult,
    Comparison,
    Measurement,
    ModelFacts,
    Pair,
    PeerRun,
)
from fairy_compile.bench.spread import Spread
from fairy_compile.bench.workload import Workload

PROMPT, DECODE = Workload(512, 0), Workload(0, 128, 64)

RESULT = BenchResult(
    model=ModelFacts(
        name="tiny|model llama w2",
        size_bytes=3 << 30,
        parameters=6_740_000_000,
        weight_bytes=1_500_000_000,
        target="cpu",
        device="cpu:0",
        act="int8",
        manifest_sha256="0123456789abcdef" * 4,
    ),
    machine=Machine("Some CPU", 2, 4, 24 << 30, "Linux x86_64", 0.25),
    versions={"fairy-compile": "0.1.0"},
    command="fairy_compile bench x",
    date="2026-01-02T03:04:05+00:00",
    threads=2,
    prefill_chunk=256,
    load_seconds=1.25,
    peak_resident_bytes=2_000_000_000,
    tests=(
        Measurement(PROMPT, Spread((30.0, 34.0)), 1.875, Spread((15e9, 16e9))),
        Measurement(
            DECODE, Spread((6.0, 8.0, 10.0)), 1.5, Spread((15e9, 16e9, 20e9)), 1_500_000_000
        ),
    ),
    kernels=(
        KernelTime("phase_gemm_a", 32, 0.075, 0.75),
        KernelTime("attention (KV cache)", 32, 0.025, 0.25),
    ),
    kernel_depth=64,
)
COMPARISON = Comparison(
    RESULT,
    "llama.cpp (llama-cpp-python 9.9)",
    (
        PeerRun(
            type="Q4_K_M",
            description="llama 7B Q4_K - Medium",
            size_bytes=4 << 30,
            tensor_types={"Q4_K": 3_000_000_000, "F32": 1_000_000},
            system="AVX2 = 1",
            pairs=(
                Pair(PROMPT, Spread((33.0,)), Spread((11.0,))),
                Pair(DECODE, Spread((9.0, 8.0, 8.5)), Spread((4.0, 4.25, 4.5))),
            ),
        ),
    ),
)
