"""What the gateway itself counts, in Prometheus' text format. The engine's figures come from Triton's own endpoint."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

#: Seconds to the first piece of text, upper ends of the histogram's buckets.
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # (path, status)
        self.running = 0
        self.disconnects = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self._first = [0] * (len(BUCKETS) + 1)
        self._first_sum = 0.0

    def first_piece(self, seconds: float) -> None:
        self._first[bisect_left(BUCKETS, seconds)] += 1
        self._first_sum += seconds

    def text(self) -> str:
        lines = _head("requests_total", "counter", "Requests answered, by path and HTTP status.")
        for (path, status), count in sorted(self.requests.items()):
            lines.append(f'echo_gateway_requests_total{{path="{path}",status="{status}"}} {count}')
        for name, kind, what, value in (
            ("running", "gauge", "Requests being answered.", self.running),
            (
                "disconnects_total",
                "counter",
                "Clients that hung up before their answer was complete.",
                self.disconnects,
            ),
            ("prompt_tokens_total", "counter", "Prompt tokens of finished requests.", self.prompt_tokens),
            ("completion_tokens_total", "counter", "Tokens generated for finished requests.", self.completion_tokens),
        ):
            lines += [*_head(name, kind, what), f"echo_gateway_{name} {value}"]
        lines += self._histogram("first_text_seconds", "Seconds from a request to its first piece of text.")
        return "\n".join(lines) + "\n"

    def _histogram(self, name: str, what: str) -> list[str]:
        lines, total = _head(name, "histogram", what), 0
        for edge, count in zip((*BUCKETS, "+Inf"), self._first, strict=True):
            total += count
            lines.append(f'echo_gateway_{name}_bucket{{le="{edge}"}} {total}')
        return [*lines, f"echo_gateway_{name}_sum {self._first_sum:.6f}", f"echo_gateway_{name}_count {total}"]


def _head(name: str, kind: str, what: str) -> list[str]:
    return [f"# HELP echo_gateway_{name} {what}", f"# TYPE echo_gateway_{name} {kind}"]
