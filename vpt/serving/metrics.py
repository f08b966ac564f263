"""Metrics for Prometheus, named like vLLM's, and ours: calls and seconds per branch."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from vpt.inference.worker import Worker
from vpt.trace.records import Trace

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_FINE = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """The metrics of one server."""

    def __init__(self, worker: Worker) -> None:
        self._registry = CollectorRegistry()
        self._gauge("num_requests_running", "requests that hold a slot", lambda: worker.num_running)
        self._gauge(
            "num_requests_waiting", "requests without a slot", lambda: max(worker.num_waiting, 0)
        )
        engine = worker.engine
        self._gauge(
            "kv_cache_usage_perc",
            "share of the slots that are taken, 0 to 1",
            lambda: 1 - engine.num_free_slots / engine.num_slots,
        )
        self._prompt = self._counter("prompt_tokens", "tokens of prompts and results of calls")
        self._cached = self._counter(
            "prefix_cache_hits", "of them, tokens that were not read again"
        )
        self._generated = self._counter("generation_tokens", "tokens written")
        self._success = self._counter("request_success", "answers", "finished_reason")
        self._calls = self._counter("perception_calls", "executed calls", "branch")
        self._call_seconds = self._counter(
            "perception_seconds", "time of encoders and LLM for calls", "branch"
        )
        self.requests = self._counter("http_requests", "answered HTTP requests", "path", "status")
        self.first_token = self._histogram("time_to_first_token_seconds", _SECONDS)
        self.inter_token = self._histogram("inter_token_latency_seconds", _FINE)
        self._total = self._histogram("e2e_request_latency_seconds", _SECONDS)
        self._queue = self._histogram("request_queue_time_seconds", _SECONDS)

    def _gauge(self, name: str, about: str, value: Callable[[], float]) -> None:
        Gauge(f"vpt:{name}", about, registry=self._registry).set_function(value)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"vpt:{name}", about, labels, registry=self._registry)

    def _histogram(self, name: str, buckets: tuple[float, ...]) -> Histogram:
        about = name.replace("_", " ")
        return Histogram(f"vpt:{name}", about, buckets=buckets, registry=self._registry)

    def add_run(self, trace: Trace, seconds: float, reason: str) -> None:
        """Count a run that has ended, ``seconds`` after it was submitted."""
        counts = trace.counts
        self._prompt.inc(counts.prompt_tokens + counts.appended_tokens)
        self._cached.inc(counts.reused_tokens)
        self._generated.inc(counts.generated_tokens)
        for call in trace.calls:
            if call.outcome == "executed":
                self._calls.labels(call.branch).inc()
                self._call_seconds.labels(call.branch).inc((call.encode_ms + call.run_ms) / 1e3)
        self._success.labels(reason).inc()
        self._total.observe(seconds)
        self._queue.observe(max(seconds - trace.timings.total / 1e3, 0))

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
