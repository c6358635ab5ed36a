"""What Prometheus is told, on a family that only notes it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from echo_trt.runtime.params import Counters
from echo_trt.serving.metrics import Metrics
from echo_trt.serving.statistics import Statistics

told: Counter[tuple[str, ...]] = Counter()


class Family:
    """In the place of Triton's MetricFamily."""

    COUNTER = GAUGE = HISTOGRAM = 0

    def __init__(self, name: str, description: str, kind: int):
        self.name = name

    def Metric(self, labels: dict[str, str], **more: Any) -> Metric:
        return Metric((self.name, *(value for name, value in labels.items() if name != "model_name")))


class Metric:
    def __init__(self, key: tuple[str, ...]):
        self.key = key

    def increment(self, by: float) -> None:
        told[self.key] += by

    def set(self, value: float) -> None:
        told[self.key] = value


def test_failures_of_the_engine_and_of_reading_are_added():
    metrics = Metrics(Family, "echo")
    for ended, refused in (({"failed": 2, "stop": 1}, {"failed": 1}), ({"failed": 2, "stop": 1}, {"failed": 2})):
        metrics.flush(Statistics(0, 0, 1, 0, 0, "echo", 1, Counters(), {}, ended), refused)
    assert told["echo_requests_total", "failed"] == 4
    assert told["echo_requests_total", "stop"] == 1
