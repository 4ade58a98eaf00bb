"""`compare`: our artifact and llama.cpp in turns, in one go, on models of the same shape.

Machines drift and others use them, so runs alternate (A B B A ...) and ratios are formed from
medians of the same minutes. Both use the same number of threads and get the same tokens.
llama.cpp has its own defaults (batches of 2048, 512 at a time, KV cache in float16).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from fairy_compile.bench.gguf_model import PeerModel, default_cache, peer_model
from fairy_compile.bench.gguf_types import PEER_TYPES
from fairy_compile.bench.llama_cpp import LlamaCppRunner, check_extra
from fairy_compile.bench.machine import PACKAGES, PEER_PACKAGES
from fairy_compile.bench.result import Comparison, Pair, PeerRun
from fairy_compile.bench.run import Bench, warm_up
from fairy_compile.bench.spread import Spread
from fairy_compile.bench.workload import Settings, Workload, alternate
from fairy_compile.config import check_choice
from fairy_compile.errors import FairyError
from fairy_compile.models import DecoderConfig, parse_config
from fairy_compile.paths import as_path
from fairy_compile.results import Progress, no_progress

DEFAULT_TYPES = ("Q4_K_M", "Q2_K", "TQ2_0")
PEERS = ("llama.cpp",)

# OpenMP's and TVM's threads spin for a while after their work; let them fall asleep.
_SETTLE_SECONDS = 0.5


def compare(
    directory: Path | str,
    settings: Settings | None = None,
    *,
    peer: str = "llama.cpp",
    types: Sequence[str] = DEFAULT_TYPES,
    cache: Path | None = None,
    command: str = "fairy_compile.bench.compare",
    progress: Progress = no_progress,
) -> Comparison:
    """Measure an artifact alone, then in turns with llama.cpp on random models of its shape.

    A type that llama.cpp fails on is reported with its reason, and the others are run.

    Args:
        directory: what ``fairy_compile build`` wrote.
        settings: what to run.
        peer: ``llama.cpp``, the only one there is.
        types: llama.cpp's weight types, of `gguf_types.PEER_TYPES`.
        cache: where random models are kept for the next time; default the user's cache directory.
        command: recorded in the result.
        progress: called as progress(what, done, total).

    Raises:
        FairyError: a choice is unknown, extra ``bench`` is not installed, llama.cpp failed on every
            type; and see `run.bench`.
    """
    settings = settings or Settings()
    directory = as_path("the artifact", directory)
    check_choice("--peer", peer, PEERS)
    for name in types:
        check_choice("--peer-types", name, PEER_TYPES)
    check_extra()
    config = artifact_config(directory)
    files = [peer_model(config, name, cache or default_cache(), progress) for name in types]
    with Bench(directory, settings, command) as ours:
        result = ours.result(progress, (*PACKAGES, *PEER_PACKAGES))
        ours.release_bandwidth_buffer()
        runs, failed = _run_all(ours, files, config, progress)
    version = result.versions.get("llama-cpp-python", "")
    return Comparison(result, f"llama.cpp (llama-cpp-python {version})", tuple(runs), failed)


def artifact_config(directory: Path) -> DecoderConfig:
    """Return the sizes of an artifact's model, from its mlc-chat-config.json."""
    from fairy_compile.artifact.mlc_config import MLC_CHAT_CONFIG
    from fairy_compile.artifact.schema import load_object
    from fairy_compile.errors import ModelFileError

    if not (directory / MLC_CHAT_CONFIG).is_file():
        raise ModelFileError(
            f"{directory} has no {MLC_CHAT_CONFIG}; name a directory that `fairy_compile build` "
            "wrote"
        )
    config = load_object(directory / MLC_CHAT_CONFIG).get("model_config")
    if not isinstance(config, dict):
        raise ModelFileError(f"{directory / MLC_CHAT_CONFIG} has no model_config object")
    return parse_config(config)


def _run_all(
    ours: Bench, files: Sequence[PeerModel], config: DecoderConfig, progress: Progress
) -> tuple[list[PeerRun], dict[str, str]]:
    """Return what ran, and type -> why it did not."""
    runs, failed = [], {}
    for file in files:
        try:
            runs.append(_run_pairs(ours, file, config, progress))
        except FairyError as error:
            failed[file.mix] = str(error)
    if not runs:
        raise FairyError("; ".join(failed.values()))
    return runs, failed


def _run_pairs(ours: Bench, file: PeerModel, config: DecoderConfig, progress: Progress) -> PeerRun:
    workloads = ours.settings.workloads()
    with LlamaCppRunner(
        file.path,
        vocab_size=config.vocab_size,
        threads=ours.threads,
        context=ours.settings.context,
        batch=ours.settings.batch,
    ) as peer:
        pairs = []
        for done, workload in enumerate(workloads):
            progress(f"{file.mix} {workload.name}", done, len(workloads))
            pairs.append(_pair(ours, peer, workload))
        return PeerRun(
            type=file.mix,
            description=peer.description,
            size_bytes=peer.size_bytes,
            tensor_types=file.tensor_types,
            system=peer.system,
            pairs=tuple(pairs),
        )


def _pair(ours: Bench, peer: LlamaCppRunner, workload: Workload) -> Pair:
    runners = {"ours": ours.runner, "peer": peer}
    rates: dict[str, list[float]] = {name: [] for name in runners}
    for runner in runners.values():
        warm_up(runner, workload)
    for name in alternate("ours", "peer", ours.settings.repetitions):
        time.sleep(max(ours.settings.cooldown, _SETTLE_SECONDS))
        rates[name].append(workload.tokens / runners[name].run(workload))
    return Pair(workload, Spread.of(rates["ours"]), Spread.of(rates["peer"]))
