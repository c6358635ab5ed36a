"""What Prometheus reads of the engine."""

from __future__ import annotations

from prometheus_client import generate_latest

from echo_trt.engine.params import Counters
from echo_trt.engine.service.metrics import EngineMetrics, Statistics


def statistics(reached: dict[int, int] | None = None, **ended: int) -> Statistics:
    counters = Counters()
    counters.reached.update(reached or {})
    return Statistics(2, 0, 1, 0, 0, "echo", 1, counters, {}, ended)


def test_failures_of_the_engine_and_of_reading_are_added():
    metrics = EngineMetrics("echo")
    for _ in range(2):
        metrics.refuse("failed")
        metrics.observe("request", 0.5)
        metrics.flush(statistics(failed=2, stop=1))
    text = generate_latest(metrics.registry).decode()
    assert 'echo_requests_total{model_name="echo",outcome="failed"} 4.0' in text
    assert 'echo_request_seconds_count{model_name="echo"} 2.0' in text


def test_counts_of_gates_never_fall():
    metrics = EngineMetrics("echo")
    for reached in ({0: 5, 1: 3}, {0: 5, 1: 4}):  # the second was read after a draft's next depth alone was counted
        metrics.flush(statistics(reached))
    text = generate_latest(metrics.registry).decode()
    assert 'echo_gates_total{decision="truncated",depth="0",model_name="echo"} 2.0' in text
    assert 'echo_gates_total{decision="extended",depth="0",model_name="echo"} 4.0' in text
