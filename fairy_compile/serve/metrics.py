"""Prometheus metrics of a server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from fairy_compile.serve.request import Event, Failed, Finished, Piece

if TYPE_CHECKING:
    from fairy_compile.serve.worker import EngineThread

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counters of one server; a registry of its own, so that several can live in a process."""

    def __init__(self, engine: EngineThread):
        self.registry = registry = CollectorRegistry()
        registry.register(_Load(engine))
        self.http = Counter(
            "fairy_http_requests",
            "HTTP requests by path and status.",
            ("path", "status"),
            registry=registry,
        )
        self.answers = Counter(
            "fairy_answers", "Answers by how they ended.", ("reason",), registry=registry
        )
        self.prompt_tokens = Counter(
            "fairy_prompt_tokens", "Prompt tokens of ended answers.", registry=registry
        )
        self.cached_tokens = Counter(
            "fairy_cached_prompt_tokens",
            "Prompt tokens of ended answers that were not run again.",
            registry=registry,
        )
        self.completion_tokens = Counter(
            "fairy_completion_tokens", "Tokens drawn by ended answers.", registry=registry
        )
        self.first_token = Histogram(
            "fairy_time_to_first_token_seconds",
            "From the request to its first text, queue included.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.per_token = Histogram(
            "fairy_time_per_token_seconds",
            "Mean time between the tokens of an answer after its first text.",
            buckets=_TOKEN_SECONDS,
            registry=registry,
        )
        self.duration = Histogram(
            "fairy_answer_seconds",
            "From the request to its end.",
            buckets=_SECONDS,
            registry=registry,
        )

    def render(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self.registry)


class AnswerTimer:
    """Feeds the events of one answer to the metrics."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics
        self._start = time.perf_counter()
        self._first: float | None = None

    def see(self, event: Event) -> None:
        """Take note of ``event``."""
        metrics, now = self._metrics, time.perf_counter()
        if isinstance(event, Piece):
            if self._first is None:
                self._first = now
                metrics.first_token.observe(now - self._start)
            return
        metrics.duration.observe(now - self._start)
        metrics.answers.labels("failed" if isinstance(event, Failed) else event.reason).inc()
        if isinstance(event, Finished):
            metrics.prompt_tokens.inc(event.prompt_tokens)
            metrics.cached_tokens.inc(event.cached_tokens)
            metrics.completion_tokens.inc(event.completion_tokens)
            if self._first is not None and event.completion_tokens > 1:
                metrics.per_token.observe((now - self._first) / (event.completion_tokens - 1))


class _Load:
    """Reads the engine's load whenever metrics are asked for."""

    def __init__(self, engine: EngineThread):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        load = self._engine.load
        for name, text, value in (
            ("fairy_running", "Answers with a sequence in the KV cache.", load.running),
            ("fairy_waiting", "Requests that wait for a sequence.", load.waiting),
            ("fairy_kv_pages_used", "KV pages that hold tokens.", load.kv_pages_used),
            (
                "fairy_kv_pages_reserved",
                "KV pages that running answers can come to need.",
                load.kv_pages_reserved,
            ),
            (
                "fairy_kv_pages_kept",
                "KV pages of ended answers, kept for prompts that begin like them.",
                load.kv_pages_kept,
            ),
            ("fairy_kv_pages_total", "KV pages in all.", load.kv_pages_total),
        ):
            yield GaugeMetricFamily(name, text, value)
