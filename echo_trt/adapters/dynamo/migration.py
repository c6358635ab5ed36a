"""What lets a worker go on with an answer that another worker began.

When a worker is lost, Dynamo's frontend sends the request to another one, with the tokens emitted so far after the
prompt. It does not say where the answer begins, but it hands on one note of the first worker unread: the link to that
worker's trace. An answer's first chunk carries the boundary and the seed in its place. Where Dynamo traces requests
(OTEL_EXPORT_ENABLED, DYN_LOGGING_JSONL) it writes a link of its own over ours, and the boundary is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MARK = "echo-trt"
#: Key of a chunk, and of the request that another worker is sent.
LEAVES, ARRIVES = "worker_trace_link", "migration_link"


@dataclass(frozen=True)
class Boundary:
    """Where an answer begins, and the seed of its draws."""

    prompt_tokens: int
    seed: int

    def link(self) -> dict[str, dict[str, str]]:
        """Return what the answer's first chunk holds besides its tokens."""
        return {LEAVES: {"trace_id": MARK, "span_id": f"{self.prompt_tokens}:{self.seed}"}}


def migrated(request: Mapping[str, Any]) -> bool:
    """Return whether another worker began to answer ``request``."""
    return bool(request.get(ARRIVES))


def boundary_of(request: Mapping[str, Any]) -> Boundary | None:
    """Return what the first worker wrote down; None: nothing, or a trace has taken its place."""
    link = request.get(ARRIVES) or {}
    if link.get("trace_id") != MARK:
        return None
    prompt_tokens, _, seed = str(link.get("span_id")).partition(":")
    return Boundary(int(prompt_tokens), int(seed))
