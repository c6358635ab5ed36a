"""The options of ``echo-trt worker``."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """The options of a worker. None stands for the recipe's value.

    name           the model's name for clients
    queue          requests that may wait for a place
    drain_seconds  seconds that open answers have to finish after a stop signal
    system_port    port of metrics and health; 0: none
    kv_cache_memory  bytes of the KV pool; None: see ``runtime.kv_pool``
    """

    bundle: Path
    name: str
    policy: str | None = None
    batch: int | None = None
    queue: int = 256
    drain_seconds: float = 60.0
    system_port: int = 0
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    kv_cache_memory: int | None = None

    def stop(self) -> None:
        """End the worker as SIGTERM does."""
        os.kill(os.getpid(), signal.SIGTERM)
