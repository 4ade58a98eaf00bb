"""`bench`: measure one artifact."""

from __future__ import annotations

import math
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from fairy_compile.bench.bandwidth import ReadBandwidth, default_bytes
from fairy_compile.bench.kernels import KernelTime, time_kernels
from fairy_compile.bench.machine import PACKAGES, Machine, peak_resident_bytes, versions
from fairy_compile.bench.result import BenchResult, Measurement, ModelFacts
from fairy_compile.bench.spread import Spread
from fairy_compile.bench.workload import Settings, Workload, tokens
from fairy_compile.errors import FairyError
from fairy_compile.paths import as_path
from fairy_compile.results import Progress, no_progress

if TYPE_CHECKING:
    from fairy_compile.artifact.manifest import Manifest
    from fairy_compile.runtime import Engine, Model

KERNEL_DEPTH = 16
"""Least tokens in the KV cache when kernels are timed."""


class EngineRunner:
    """Runs workloads on an engine; llama.cpp's runner has the same methods."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._sequence: int | None = None

    def run(self, workload: Workload) -> float:
        """Run ``workload`` and return the seconds of its timed part.

        Every token's logits reach the host, as a sampler would need them.
        """
        engine = self._engine
        sequence = self.at_depth(workload.depth)
        ids = tokens(engine.vocab_size, workload.tokens)
        start = time.perf_counter()
        if workload.is_decode:
            for token in ids:
                engine.decode([sequence], [token])
        else:
            engine.prefill(sequence, ids)
        return time.perf_counter() - start

    def at_depth(self, depth: int) -> int:
        """Return a sequence of ``depth`` tokens, the same one for the same depth."""
        engine, sequence = self._engine, self._sequence
        if sequence is not None and 0 < depth <= engine.length(sequence):
            engine.popn(sequence, engine.length(sequence) - depth)
            return sequence
        if sequence is not None:
            engine.remove_sequence(sequence)
        self._sequence = sequence = engine.add_sequence()
        if depth:
            engine.prefill(sequence, tokens(engine.vocab_size, depth))
        return sequence


def bench(
    directory: Path | str,
    settings: Settings | None = None,
    *,
    command: str = "fairy_compile.bench.bench",
    progress: Progress = no_progress,
) -> BenchResult:
    """Measure the artifact in ``directory``; ``settings`` default to pp512 and tg128.

    Args:
        directory: what ``fairy_compile build`` wrote.
        settings: what to run.
        command: recorded in the result.
        progress: called as progress(what, done, total).

    Raises:
        FairyError: see `fairy_compile.load`; also if a test needs more context than the model has.
    """
    settings = settings or Settings()
    with Bench(as_path("the artifact", directory), settings, command) as session:
        return session.result(progress)


class Bench:
    """A loaded artifact and what is needed to measure it. Use it as a context manager.

    Attributes:
        settings: what to run.
        model: the loaded model.
        runner: runs workloads on it.
    """

    def __init__(self, directory: Path, settings: Settings, command: str):
        from fairy_compile.artifact.manifest import Manifest
        from fairy_compile.runtime import load_language_model

        self.settings = settings
        self._machine = Machine.here()  # the load average before our own work
        self._command = command
        manifest = Manifest.load(directory)
        manifest.check_language_model(directory)
        start = time.perf_counter()
        self.model: Model = load_language_model(
            directory,
            settings.device,
            threads=settings.threads,
            cpus=settings.cpus,
            max_sequences=1,
            context=_context(settings, manifest),
        )
        self._load_seconds = time.perf_counter() - start
        engine = self.model.engine
        if settings.batch is not None:
            engine.chunk = min(settings.batch, engine.chunk)
        self.facts = model_facts(directory, manifest, str(engine.device))
        self.runner = EngineRunner(engine)
        self._bandwidth: ReadBandwidth | None = None

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.model.close()

    @property
    def threads(self) -> int:
        """CPU threads in use."""
        return self.model.engine.threads

    def result(
        self, progress: Progress = no_progress, packages: tuple[str, ...] = PACKAGES
    ) -> BenchResult:
        """Run all workloads and time the kernels.

        Args:
            progress: called as progress(what, done, total).
            packages: whose versions to record.
        """
        workloads = self.settings.workloads()
        warm_up(self.runner, workloads[0])
        peak = peak_resident_bytes()
        tests = []
        for done, workload in enumerate(workloads):
            progress(workload.name, done, len(workloads))
            tests.append(self._measure(workload))
        kernels, depth = self._time_kernels()
        return BenchResult(
            model=self.facts,
            machine=self._machine,
            versions=versions(packages),
            command=self._command,
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            threads=self.threads,
            prefill_chunk=self.model.engine.chunk,
            load_seconds=self._load_seconds,
            peak_resident_bytes=peak,
            tests=tuple(tests),
            kernels=kernels,
            kernel_depth=depth,
        )

    def release_bandwidth_buffer(self) -> None:
        """Free the buffer of the read kernel."""
        self._bandwidth = None

    def _measure(self, workload: Workload) -> Measurement:
        on_cpu = self.model.engine.device.dlpack_device_type() == _DLPACK_CPU
        if on_cpu and self._bandwidth is None:
            self._bandwidth = ReadBandwidth(default_bytes(self._machine.memory_bytes))
        warm_up(self.runner, workload)
        rates, reads, busy = [], [], []
        for _ in range(self.settings.repetitions):
            time.sleep(self.settings.cooldown)
            if self._bandwidth is not None:
                reads.append(self._bandwidth.measure())
            self.runner.at_depth(workload.depth)  # before both clocks
            worked = time.process_time()
            seconds = self.runner.run(workload)
            busy.append((time.process_time() - worked) / seconds)
            rates.append(workload.tokens / seconds)
        return Measurement(
            workload,
            Spread.of(rates),
            Spread.of(busy).median,
            Spread.of(reads) if reads else None,
            self.facts.weight_bytes if workload.is_decode else None,
        )

    def _time_kernels(self) -> tuple[tuple[KernelTime, ...], int]:
        engine = self.model.engine
        depth = min(max(KERNEL_DEPTH, *self.settings.depth, 0), engine.context - 1)
        sequence = self.runner.at_depth(depth)
        return time_kernels(engine, sequence, tokens(engine.vocab_size, 1)[0]), depth


_DLPACK_CPU = 1


def warm_up(runner: EngineRunner, workload: Workload) -> None:
    """Run ``workload`` once untimed, but at most one token of a generation, as llama-bench does."""
    runner.run(Workload(0, 1, workload.depth) if workload.is_decode else workload)


def _context(settings: Settings, manifest: Manifest) -> int:
    """Return the context to load with: what the tests need, and room to time kernels.

    Raises:
        FairyError: the tests need more than the model has.
    """
    most = int(manifest.metadata["context_window_size"])
    if settings.context > most:
        raise FairyError(
            f"context is {settings.context} tokens, --depth with --n-prompt or --n-gen; this model "
            f"was built for 1 to {most}: give smaller ones, such as -p {most} -n {min(128, most)}"
        )
    return max(settings.context, min(settings.context + 2 * KERNEL_DEPTH, most))


def model_facts(directory: Path, manifest: Manifest, device: str) -> ModelFacts:
    """Sum up an artifact from its manifest."""
    from fairy_compile.artifact.files import sha256_file
    from fairy_compile.artifact.manifest import MANIFEST
    from fairy_compile.artifact.tensor_cache import ITEMSIZE

    stored = sum(math.prod(p.shape) * ITEMSIZE[p.dtype] for p in manifest.params)
    # Codes, tables and scales of a layer stand for out x in weights; other parameters for
    # themselves.
    dense = (p for p in manifest.params if p.role in ("embedding", "norm", "bias"))
    parameters = sum(math.prod(layer.shape) for layer in manifest.layers)
    parameters += sum(math.prod(p.shape) for p in dense)
    return ModelFacts(
        name=f"{manifest.source.name} {manifest.model.family} {manifest.quant['quant']}",
        size_bytes=stored,
        parameters=parameters,
        weight_bytes=sum(layer.bytes for layer in manifest.layers),
        target=manifest.target.name,
        device=device,
        act=str(manifest.quant["act"]),
        manifest_sha256=sha256_file(directory / MANIFEST),
    )
