"""KV events: which blocks a worker's prefix cache keeps, so that Dynamo's router knows where a prompt's beginning is.

A block's key covers its 32 tokens and the next one (``engine.kv_blocks``), as Dynamo's keys for EAGLE heads do:
Dynamo hashes windows of 33 tokens, which overlap by one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from echo_trt.engine.kv_blocks import rows
from echo_trt.speculation.pack import BLOCK

log = logging.getLogger(__name__)


class BlockEvents:
    """Hands events on to ``publisher``, Dynamo's KvEventPublisher, which queues them.

    It is called in the middle of an iteration. A publisher that fails is logged, the first time in a row, and costs no
    answer: the router places prompts worse.
    """

    def __init__(self, publisher: Any):
        self._publisher = publisher
        self._failing = False

    def stored(self, keys: Sequence[bytes], tokens: np.ndarray, indices: Sequence[int]) -> None:
        """Do as ``prefix_cache.Listener``: an event for each row of blocks, with the hash of the block before it."""
        for first, last in rows(indices):
            self._publish(
                self._publisher.publish_stored,
                tokens[first * BLOCK : last * BLOCK + 1].tolist(),
                [BLOCK] * (last - first),
                [block_hash(key) for key in keys[first:last]],
                block_hash(keys[first - 1]) if first else None,
                is_eagle=True,
            )

    def removed(self, keys: Sequence[bytes]) -> None:
        self._publish(self._publisher.publish_removed, [block_hash(key) for key in keys])

    def _publish(self, publish: Callable[..., Any], *values: Any, **more: Any) -> None:
        try:
            publish(*values, **more)
        except Exception:  # the engine's thread is no place for the router's trouble
            if not self._failing:
                log.exception("the router is not told of KV blocks; it cannot send prompts to where they are cached")
            self._failing = True
        else:
            self._failing = False


def block_hash(key: bytes) -> int:
    """Return a key's first 64 bits, as Dynamo has block hashes: signed."""
    return int.from_bytes(key[:8], "little", signed=True)
