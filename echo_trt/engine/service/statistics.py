"""What a service says of itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from echo_trt.engine.params import Counters


@dataclass(frozen=True)
class Statistics:
    """The service at about one moment; ``ended`` counts requests by reason."""

    queued: int
    running: int
    blocks: int
    blocks_used: int
    blocks_cached: int
    policy: str
    budget: int
    counters: Counters
    drafts: dict[str, dict[str, float]]  # ``Planner.totals``
    ended: dict[str, int] = field(default_factory=dict)
    engine_failures: int = 0
    queued_tokens: int = 0  # of the prompts that wait
    gain: float | None = None  # tokens per second over plain decoding's at the latest load; None: not known

    @property
    def kv_usage(self) -> float:
        """The share of the KV pool that requests hold."""
        return self.blocks_used / self.blocks
