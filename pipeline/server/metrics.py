"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from pipeline.inference.async_engine import AsyncEngine
from pipeline.inference.request import GenerationResult

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_FIRST_TOKEN_BUCKETS_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

disable_created_metrics()  # type: ignore[no-untyped-call]  # one series for each counter


class Metrics:
    """Counters of one application; any thread may add to them."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter("requests", "requests by model and status", "status")
        self._prompt_tokens = self._counter("prompt_tokens", "tokens of prompts")
        self._cached_tokens = self._counter("cached_tokens", "prompt tokens found in the cache")
        self._generated_tokens = self._counter("generated_tokens", "tokens of answers")
        self._first_token_seconds = Histogram(
            "gatt_first_token_seconds",
            "from a request's arrival in the engine to its first token",
            ("model",),
            buckets=_FIRST_TOKEN_BUCKETS_SECONDS,
            registry=self._registry,
        )
        for name in engine.names:  # a counter exists, with 0, before its first increment
            for counter in (self._prompt_tokens, self._cached_tokens, self._generated_tokens):
                counter.labels(name)
        self._registry.register(_EngineState(engine))

    def count_request(self, model: str, status: int) -> None:
        """Count a response with this status.

        `model` is "" if the request was not valid, or named none that is served.
        """
        self._requests.labels(model, status).inc()

    def count_result(self, model: str, result: GenerationResult) -> None:
        """Count the tokens of an answer that has ended."""
        self._prompt_tokens.labels(model).inc(result.prompt_tokens)
        self._cached_tokens.labels(model).inc(result.cached_tokens)
        self._generated_tokens.labels(model).inc(result.tokens)
        if result.first_token_seconds is not None:
            self._first_token_seconds.labels(model).observe(result.first_token_seconds)

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        """Return a counter that is exposed as gatt_NAME_total."""
        labels = ("model", *labels)
        return Counter(f"gatt_{name}", documentation, labels, registry=self._registry)


class _EngineState(Collector):
    """Gauges that are read from the engine when the metrics are."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the present state of every model."""
        sequences, in_use, queue = (
            GaugeMetricFamily(f"gatt_{name}", documentation, labels=("model",))
            for name, documentation in (
                ("sequences", "answers that can be generated at the same time"),
                ("sequences_in_use", "answers that are being generated"),
                ("queue", "requests that wait"),
            )
        )
        for name in self._engine.names:
            state = self._engine.stats(name)
            sequences.add_metric((name,), state.sequences)
            in_use.add_metric((name,), state.busy)
            queue.add_metric((name,), state.waiting)
        yield from (sequences, in_use, queue)
