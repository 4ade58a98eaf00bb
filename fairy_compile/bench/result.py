"""What a measurement found: plain data, printed by `bench.tables` and saved as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fairy_compile.bench.kernels import KernelTime
from fairy_compile.bench.machine import Machine
from fairy_compile.bench.spread import Spread
from fairy_compile.bench.workload import Workload
from fairy_compile.results import to_plain


@dataclass(frozen=True)
class ModelFacts:
    """The artifact that was measured.

    Attributes:
        name: source and quantisation, e.g. ``Fairy2i-W2 llama w2``.
        size_bytes: all parameters as stored.
        parameters: real weights they stand for.
        weight_bytes: packed weights of all linear layers, what one decode step reads.
        target: target it was built for.
        device: TVM device it ran on.
        act: activation contract.
        manifest_sha256: hash of fairy.json, which holds the hashes of all other files.
    """

    name: str
    size_bytes: int
    parameters: int
    weight_bytes: int
    target: str
    device: str
    act: str
    manifest_sha256: str


@dataclass(frozen=True)
class Measurement:
    """One test.

    Attributes:
        workload: what ran.
        tokens_per_second: one sample a repetition.
        read_bytes_per_second: plain read bandwidth measured before each repetition; None where
            the device is not this CPU.
        cores_busy: processor seconds of this process over wall seconds, median. Well below the
            number of threads where threads sleep, or where others hold the cores.
        weight_bytes: bytes of weights a token reads in a decode test, None in a prompt test.
    """

    workload: Workload
    tokens_per_second: Spread
    cores_busy: float
    read_bytes_per_second: Spread | None = None
    weight_bytes: int | None = None

    @property
    def weight_bytes_per_second(self) -> float | None:
        """Median rate at which a decode test read weights."""
        if self.weight_bytes is None:
            return None
        return self.weight_bytes * self.tokens_per_second.median

    @property
    def read_share(self) -> float | None:
        """That rate over the bandwidth of a plain read: median of the repetitions' ratios.

        1 would mean that a token takes no longer than reading its weights.
        """
        if self.weight_bytes is None or self.read_bytes_per_second is None:
            return None
        pairs = zip(self.tokens_per_second.samples, self.read_bytes_per_second.samples, strict=True)
        return Spread.of(self.weight_bytes * rate / read for rate, read in pairs).median

    def to_json(self) -> dict[str, Any]:
        """Return everything, derived figures included."""
        return {
            "test": self.workload.name,
            **to_plain(self),
            "weight_bytes_per_second": self.weight_bytes_per_second,
            "read_share": self.read_share,
        }


@dataclass(frozen=True)
class RunFacts:
    """What every result says of its run; base of results, whose own fields follow.

    Attributes:
        model: the artifact.
        machine: where it ran.
        versions: package -> version.
        command: the command line, or the call.
        date: UTC, ISO 8601.
        threads: CPU threads.
    """

    model: ModelFacts
    machine: Machine
    versions: dict[str, str]
    command: str
    date: str
    threads: int

    def to_json(self) -> dict[str, Any]:
        """Return plain dictionaries and lists."""
        return to_plain(self)


@dataclass(frozen=True)
class BenchResult(RunFacts):
    """One artifact on one machine.

    Attributes, beside those of `RunFacts`:
        prefill_chunk: most prompt tokens of one call.
        load_seconds: until the first token could be run, hashes checked.
        peak_resident_bytes: of the process after the warm-up; None where it is not known.
        tests: the measurements.
        kernels: time of each kernel in one decode step.
        kernel_depth: tokens in the KV cache when kernels were timed.
    """

    prefill_chunk: int
    load_seconds: float
    peak_resident_bytes: int | None
    tests: tuple[Measurement, ...]
    kernels: tuple[KernelTime, ...]
    kernel_depth: int


@dataclass(frozen=True)
class Pair:
    """One test of both programs, run in turns.

    Attributes:
        workload: what ran.
        ours: tokens per second of fairy_compile.
        peer: tokens per second of the other program.
    """

    workload: Workload
    ours: Spread
    peer: Spread

    @property
    def ratio(self) -> float:
        """Our median over the peer's median: above 1 we are faster."""
        return self.ours.median / self.peer.median

    @property
    def best_ratio(self) -> float:
        """Our fastest run over the peer's: what is left when others used the machine meanwhile."""
        return self.ours.high / self.peer.high

    def to_json(self) -> dict[str, Any]:
        """Return everything, the ratios included."""
        ratios = {"ratio": self.ratio, "best_ratio": self.best_ratio}
        return {"test": self.workload.name, **to_plain(self), **ratios}


@dataclass(frozen=True)
class PeerRun:
    """Our artifact against one file of the other program.

    Attributes:
        type: llama.cpp's name of the mix, e.g. ``Q4_K_M``.
        description: the program's own description of the model.
        size_bytes: of its tensors.
        tensor_types: type -> bytes stored in it.
        system: instruction sets the program reports to use.
        pairs: the tests.
    """

    type: str
    description: str
    size_bytes: int
    tensor_types: dict[str, int]
    system: str
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Comparison:
    """Our artifact alone, and in turns with each file of the peer.

    Attributes:
        result: our artifact alone.
        peer: name and version of the other program.
        runs: one a type.
        failed: type -> why the peer could not run it; not among ``runs``.
    """

    result: BenchResult
    peer: str
    runs: tuple[PeerRun, ...]
    failed: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain dictionaries and lists."""
        return to_plain(self)
