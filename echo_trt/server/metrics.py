"""What the API server itself counts, for Prometheus."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

#: Seconds to the first piece of text, upper ends of the histogram's buckets.
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class ServerMetrics:
    """Each is named echo_gateway_*, counters with _total."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        own: dict[str, Any] = {"namespace": "echo", "subsystem": "gateway", "registry": self._registry}
        self.requests = Counter("requests", "Requests answered, by path and HTTP status.", ("path", "status"), **own)
        self.running = Gauge("running", "Chats, completions and responses being answered.", **own)
        self.disconnects = Counter("disconnects", "Clients that hung up before their answer was complete.", **own)
        self.prompt_tokens = Counter("prompt_tokens", "Prompt tokens of finished requests.", **own)
        self.completion_tokens = Counter("completion_tokens", "Tokens generated for finished requests.", **own)
        about = "Seconds from a request to its first piece of text."
        self.first_text = Histogram("first_text_seconds", about, buckets=BUCKETS, **own)
        about = "Whether the engine's metrics, which follow these, could be fetched."
        self.engine_up = Gauge("engine_metrics_up", about, **own)

    def text(self) -> str:
        return generate_latest(self._registry).decode()
