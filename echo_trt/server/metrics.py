"""What the API server itself counts, for Prometheus."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

KEPT_S = 0.25  # seconds for which the text of a scrape is kept, so that any number of clients cost as much as one
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
        self.connections = Gauge("connections", "Open connections.", **own)
        self.max_connections = Gauge("max_connections", "Connections that may be open.", **own)
        self._scraping, self._text, self._read = asyncio.Lock(), "", float("-inf")

    def text(self) -> str:
        return generate_latest(self._registry).decode()

    async def scrape(self, engine: Callable[[], Awaitable[str | None]]) -> str:
        """Return these metrics and those that ``engine`` reads, None where it cannot, at most KEPT_S old."""
        async with self._scraping:
            if time.monotonic() - self._read > KEPT_S:
                theirs = await engine()
                self.engine_up.set(theirs is not None)
                self._text, self._read = self.text() + (theirs or ""), time.monotonic()
            return self._text
