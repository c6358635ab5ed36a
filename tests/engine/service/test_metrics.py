"""What Prometheus reads of the engine, and Triton's endpoint through a family that only notes what it is told."""

from __future__ import annotations

from collections import Counter
from typing import Any

from prometheus_client import generate_latest

from echo_trt.adapters.triton.metrics import Bridge
from echo_trt.engine.params import Counters
from echo_trt.engine.process.metrics import EngineMetrics
from echo_trt.engine.service.statistics import Statistics

reported: Counter[tuple[str, ...]] = Counter()


class Family:
    """In the place of Triton's MetricFamily."""

    COUNTER, GAUGE, HISTOGRAM = range(3)

    def __init__(self, name: str, description: str, kind: int):
        self.name = name

    def Metric(self, labels: dict[str, str], **more: Any) -> Series:
        return Series((self.name, *(value for name, value in labels.items() if name != "model_name")))


class Series:
    def __init__(self, key: tuple[str, ...]):
        self.key = key

    def increment(self, by: float) -> None:
        reported[self.key] += by

    def set(self, value: float) -> None:
        reported[self.key] = value

    def observe(self, seconds: float) -> None:
        reported[(*self.key, str(seconds))] += 1


def statistics(reached: dict[int, int] | None = None, **ended: int) -> Statistics:
    counters = Counters()
    counters.reached.update(reached or {})
    return Statistics(2, 0, 1, 0, 0, "echo", 1, counters, {}, ended)


def test_failures_of_the_engine_and_of_reading_are_added_and_triton_is_told_the_same():
    metrics = EngineMetrics("echo")
    bridge = Bridge(metrics, Family, "echo")
    for _ in range(2):
        metrics.refuse("failed")
        metrics.observe("request", 0.5)
        metrics.flush(statistics(failed=2, stop=1))
        bridge.copy()
        bridge.copy()
    assert reported["echo_requests_total", "failed"] == 4
    assert reported["echo_requests_total", "stop"] == 1
    assert reported["echo_queued",] == 2
    assert reported["echo_request_seconds", "0.5"] == 2
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
