"""`Engine`: tokens in, logits out, over the paged KV cache of a compiled model."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fairy_compile.artifact.contract import DECODE_PAGES
from fairy_compile.config import is_whole
from fairy_compile.errors import FairyError
from fairy_compile.runtime.kv_cache import KVCache
from fairy_compile.runtime.library import CallCount, ModelLibrary, open_device
from fairy_compile.runtime.steps import CacheSteps, PageSteps, Steps
from fairy_compile.runtime.threads import set_threads

DEFAULT_KV_TOKENS = 8192
"""Tokens the KV cache holds in all unless one context alone needs more (MLC's local mode)."""


@dataclass
class Phase:
    """Tokens and wall-clock seconds of all prefills, or of all decode steps."""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Throughput; 0 before the first token."""
        return self.tokens / self.seconds if self.seconds else 0.0


class Engine:
    """Runs the functions of a model library on a set of sequences.

    Threads may share it: their calls wait for each other, step by step.

    Attributes:
        config: the MLC chat configuration.
        metadata: the library's own description.
        vocab_size: width of the logits.
        chunk: most tokens of one prefill call, over all its sequences.
        context: most tokens of one sequence.
        threads: CPU threads the kernels use.
        steps: prepares calls of the library's functions.
        cache: the KV cache.
    """

    def __init__(
        self,
        directory: Path,
        library: Path,
        config: Mapping[str, Any],
        *,
        device: str = "cpu",
        threads: int | None = None,
        cpus: Collection[int] | None = None,
        max_sequences: int = 4,
        context: int | None = None,
        kv_tokens: int | None = None,
        prefill_chunk: int | None = None,
    ):
        """Open the library, load the weights and create the KV cache.

        Nothing is checked here: ``directory`` must have passed `fairy_compile.verify`, as
        `fairy_compile.load` sees to. Native code trusts what it loads.

        Args:
            directory: holds tensor-cache.json and the shards.
            library: the compiled library.
            config: content of mlc-chat-config.json.
            device: TVM device, e.g. ``cpu`` or ``cuda:0``.
            threads: CPU threads; default one a physical core.
            cpus: CPUs they may run on; default all this process may.
            max_sequences: most sequences at a time.
            context: most tokens of one sequence; default the model's.
            kv_tokens: tokens the cache holds in all; default ``max_sequences`` contexts, but at
                most `DEFAULT_KV_TOKENS` unless one context is longer.
            prefill_chunk: most tokens of one prefill call; default what the model was built for.

        Raises:
            FairyError: an argument is out of range.
            ModelFileError: library or weights cannot be loaded.
        """
        self._lock = threading.RLock()  # neither TVM's machine nor the cache can do two things
        self.threads = set_threads(threads, cpus)
        self.device = open_device(device)
        self.library = ModelLibrary(library, self.device)
        self.config = config
        self.metadata = self.library.metadata
        self.vocab_size = int(config["vocab_size"])
        self.context = self._choose_context(context)
        self.chunk = self._choose_chunk(prefill_chunk)
        most = int(self.metadata["max_batch_size"])
        if not is_whole(max_sequences) or not 1 <= max_sequences <= most:
            raise FairyError(
                f"max_sequences is {max_sequences!r}; this model was built for 1 to {most}"
            )
        self.prefill_phase = Phase()
        self.decode_phase = Phase()
        self.params = self.library.load_params(directory)
        if kv_tokens is None:
            kv_tokens = max(self.context, min(self.context * max_sequences, DEFAULT_KV_TOKENS))
        if not is_whole(kv_tokens) or kv_tokens < 1:
            raise FairyError(f"kv_tokens is {kv_tokens!r}; allowed: 1 or more")
        kind = PageSteps if self.library.has(DECODE_PAGES) else CacheSteps
        self.steps: Steps = kind(self.library, self.params, (max_sequences, kv_tokens, self.chunk))
        self.cache = KVCache(
            self.steps.pages,
            context=self.context,
            capacity=kv_tokens,
            max_sequences=max_sequences,
        )

    def _choose_context(self, wanted: int | None) -> int:
        limits = (self.metadata.get("context_window_size"), self.config.get("context_window_size"))
        most = min(map(_limit, limits))
        if wanted is None:
            return most if most < _UNLIMITED else DEFAULT_KV_TOKENS
        if not is_whole(wanted) or not 1 <= wanted <= most:
            raise FairyError(f"context is {wanted!r} tokens; this model was built for 1 to {most}")
        return wanted

    def _choose_chunk(self, wanted: int | None) -> int:
        built = int(self.metadata["prefill_chunk_size"])
        most = min(built, _limit(self.config.get("prefill_chunk_size")), self.context)
        if wanted is None:
            return most
        if not is_whole(wanted) or not 1 <= wanted <= built:
            raise FairyError(
                f"prefill_chunk is {wanted!r} tokens; this model was built for 1 to {built}"
            )
        return min(most, wanted)

    @property
    def counts(self) -> Mapping[str, CallCount]:
        """Calls, tokens and seconds of each library function."""
        return self.library.counts

    @cached_property
    def activation_bytes(self) -> int:
        """Bytes of one activation, read off the library's own embedding buffer."""
        import tvm

        buffer = self.library.call("alloc_embedding_tensor")
        return tvm.DataType(str(buffer.dtype)).bits // 8

    def add_sequence(self) -> int:
        """Start an empty sequence and return its id."""
        with self._lock:
            return self.cache.add()

    def remove_sequence(self, sequence: int) -> None:
        """Forget a sequence."""
        with self._lock:
            self.cache.remove(sequence)

    def fork(self, sequence: int, position: int | None = None) -> int:
        """Return a new sequence that begins as the first ``position`` tokens of another."""
        with self._lock:
            return self.cache.fork(sequence, position)

    def popn(self, sequence: int, count: int) -> None:
        """Drop the last ``count`` tokens of a sequence."""
        with self._lock:
            self.cache.popn(sequence, count)

    def length(self, sequence: int) -> int:
        """Return the tokens of a sequence in the cache."""
        return self.cache.length(sequence)

    def prefill(self, sequence: int, tokens: Sequence[int]) -> np.ndarray:
        """Append ``tokens`` to a sequence, chunk by chunk.

        Returns:
            float32 [vocab], the logits after the last token.

        Raises:
            FairyError: no tokens, a token outside the vocabulary, or more than the context holds.
        """
        ids = self.check_tokens(tokens)
        self.cache.check_room([sequence], [len(ids)])
        for start in range(0, len(ids), self.chunk):
            part = ids[start : start + self.chunk]
            logits = self._prefill_step([sequence], [part])
        return logits[0]

    def prefill_many(self, requests: Mapping[int, Sequence[int]]) -> dict[int, np.ndarray]:
        """Append tokens to several sequences, sharing prefill calls of up to a chunk.

        Returns:
            sequence -> float32 [vocab], the logits after its last token.
        """
        left = {sequence: self.check_tokens(tokens) for sequence, tokens in requests.items()}
        self.cache.check_room(list(left), [len(ids) for ids in left.values()])
        logits: dict[int, np.ndarray] = {}
        while left:
            room, batch = self.chunk, {}
            for sequence, ids in left.items():
                if room and len(batch) < self.cache.max_sequences:
                    batch[sequence] = ids[:room]
                    room -= len(batch[sequence])
            parts = list(batch.values())
            ends = np.cumsum([len(part) for part in parts]) - 1
            rows = self._prefill_step(list(batch), parts, ends)
            for row, (sequence, part) in zip(rows, batch.items(), strict=True):
                left[sequence] = left[sequence][len(part) :]
                if not len(left[sequence]):
                    logits[sequence] = row
                    del left[sequence]
        return {sequence: logits[sequence] for sequence in requests}

    def prefill_logits(self, sequence: int, tokens: Sequence[int]) -> np.ndarray:
        """Append ``tokens`` and return the logits after each: float32 [len, vocab]."""
        ids = self.check_tokens(tokens)
        self.cache.check_room([sequence], [len(ids)])
        logits = np.empty((len(ids), self.vocab_size), np.float32)
        for start in range(0, len(ids), self.chunk):
            part = ids[start : start + self.chunk]
            every = np.arange(len(part))
            logits[start : start + len(part)] = self._prefill_step([sequence], [part], every)
        return logits

    def decode(
        self, sequences: Sequence[int], tokens: Sequence[int], *, exact: bool = False
    ) -> np.ndarray:
        """Append ``tokens[i]`` to ``sequences[i]``, all in one step.

        Args:
            sequences: ids, each at most once.
            tokens: one a sequence.
            exact: compute each as if it were alone, where the library knows how to; see
                `serve.invariance`.

        Returns:
            float32 [len(sequences), vocab].
        """
        if len(sequences) != len(tokens):
            raise FairyError(f"decode got {len(sequences)} sequences and {len(tokens)} tokens")
        ids = self.check_tokens(tokens)
        with self._lock:
            start = time.perf_counter()
            with self.cache.forward(sequences, [1] * len(ids)):
                name, arguments = self.steps.decode(ids, exact=exact)
                logits = self.library.call_logits(name, *arguments, tokens=len(ids))
            self.decode_phase.tokens += len(ids)
            self.decode_phase.seconds += time.perf_counter() - start
        return logits.reshape(len(ids), -1)

    def trace_decode(self, sequence: int, token: int) -> dict[str, int]:
        """Run one decode step under instrumentation; return kernel name -> calls."""
        ids = self.check_tokens([token])
        with self._lock, self.cache.forward([sequence], [1]):
            name, arguments = self.steps.decode(ids)
            return self.library.traced(name, *arguments)

    def _prefill_step(
        self,
        sequences: Sequence[int],
        parts: Sequence[np.ndarray],
        positions: np.ndarray | None = None,
    ) -> np.ndarray:
        """Run one prefill call; return float32 [rows, vocab].

        Args:
            sequences: ids.
            parts: tokens of each.
            positions: rows that get logits; None is the last one of a single sequence.
        """
        ids = np.concatenate(parts)
        rows = None if positions is None else positions.astype(np.int32)
        with self._lock:
            start = time.perf_counter()
            with self.cache.forward(sequences, [len(part) for part in parts]):
                name, arguments = self.steps.prefill(ids, rows)
                logits = self.library.call_logits(name, *arguments, tokens=len(ids))
            self.prefill_phase.tokens += len(ids)
            self.prefill_phase.seconds += time.perf_counter() - start
        return logits.reshape(-1, logits.shape[-1])

    def to_device(self, array: np.ndarray) -> Any:
        """Return a copy of ``array`` on the engine's device."""
        return self.library.to_device(array)

    def check_tokens(self, tokens: Sequence[int]) -> np.ndarray:
        """Return ``tokens`` as int32 (n,).

        Raises:
            FairyError: they are none, or not integers of the vocabulary.
        """
        try:
            ids = np.asarray(tokens)
        except (TypeError, ValueError, OverflowError) as error:
            raise FairyError(f"tokens must be a sequence of integers: {error}") from error
        if ids.size == 0:
            raise FairyError("there are no tokens to run; give at least one")
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise FairyError(f"tokens must be a flat sequence of integers, not {ids.dtype} array")
        # The embedding kernel reads its table at these indices without looking.
        wrong = ids[(ids < 0) | (ids >= self.vocab_size)]
        if wrong.size:
            raise FairyError(
                f"token {int(wrong[0])} is outside the vocabulary; allowed: 0 to "
                f"{self.vocab_size - 1}"
            )
        return ids.astype(np.int32)


_UNLIMITED = 1 << 62


def _limit(value: Any) -> int:
    """Return a size from the configuration; missing and -1 mean no limit."""
    return _UNLIMITED if value is None or int(value) < 0 else int(value)
