"""The engine's metrics in Triton's endpoint. One thread alone may touch it: two abort the server."""

from __future__ import annotations

from collections import deque
from typing import Any

from echo_trt.engine.service.metrics import HISTOGRAMS, SECONDS, EngineMetrics


class Bridge:
    """Copies an engine's metrics into ``family``, Triton's MetricFamily."""

    def __init__(self, metrics: EngineMetrics, family: Any, model: str):
        self._metrics, self._family = metrics, family
        self._series: dict[tuple, Any] = {}
        self._families: dict[str, Any] = {}  # a family that is collected takes its metrics along
        self._copied: dict[tuple, float] = {}
        metrics.observed = deque()
        self._histograms = {
            name: self._make(f"echo_{name}_seconds", text, "histogram", {"model_name": model}, buckets=SECONDS)
            for name, text in HISTOGRAMS.items()
        }

    def copy(self) -> None:
        for metric in self._metrics.collect():
            for name, labels, value, *_ in metric.samples:
                key = (name, *labels.values())
                series = self._series.get(key) or self._make(name, metric.documentation, metric.type, labels)
                self._series[key], before = series, self._copied.get(key, 0)
                if value != before:
                    series.increment(value - before) if metric.type == "counter" else series.set(value)
                    self._copied[key] = value
        while self._metrics.observed:
            name, seconds = self._metrics.observed.popleft()
            self._histograms[name].observe(seconds)

    def _make(self, name: str, text: str, kind: str, labels: dict[str, str], **more: Any) -> Any:
        if name not in self._families:
            family = self._family
            self._families[name] = family(name=name, description=text, kind=getattr(family, kind.upper()))
        return self._families[name].Metric(labels=labels, **more)
