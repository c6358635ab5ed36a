"""The engine's metrics in a registry of prometheus_client's."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from echo_trt.serving.metrics import Metrics
from echo_trt.serving.statistics import Statistics


class _Metric:
    """One series, with the calls that ``Metrics`` makes of Triton's."""

    def __init__(self, series: Any):
        self.increment = getattr(series, "inc", None)
        self.set = getattr(series, "set", None)
        self.observe = getattr(series, "observe", None)


def family_in(registry: CollectorRegistry) -> type:
    """Return a class like Triton's MetricFamily, whose metrics stand in ``registry``."""

    class Family:
        COUNTER, GAUGE, HISTOGRAM = Counter, Gauge, Histogram

        def __init__(self, name: str, description: str, kind: Any):
            self._name, self._description, self._kind = name, description, kind
            self._metric: Any = None  # its labels are known with the first series

        def Metric(self, labels: dict[str, str], **more: Any) -> _Metric:
            if self._metric is None:
                self._metric = self._kind(self._name, self._description, list(labels), registry=registry, **more)
            return _Metric(self._metric.labels(**labels))

    return Family


class EngineMetrics:
    """``registry`` holds the same series as Triton's endpoint, of a model that clients call ``name``."""

    def __init__(self, name: str):
        self.registry = CollectorRegistry()
        self._metrics = Metrics(family_in(self.registry), name)
        self.ended, self.observe = self._metrics.ended, self._metrics.observe
        self.refused: dict[str, int] = {}

    def flush(self, now: Statistics) -> None:
        self._metrics.flush(now, self.refused)

    def refuse(self, outcome: str) -> None:
        """Count a request that the service never took."""
        self.refused[outcome] = self.refused.get(outcome, 0) + 1
