"""KV events: which blocks a worker's prefix cache keeps, so that Dynamo's router knows where a prompt's beginning is.

A block's key depends on the token behind it, too (``runtime.prefix_cache``). Dynamo knows such keys, as those of EAGLE
heads: it hashes windows of 33 tokens, which overlap by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from echo_trt.decoding.pack import BLOCK


class BlockEvents:
    """Hands events on to ``publisher``, Dynamo's KvEventPublisher, which queues them."""

    def __init__(self, publisher: Any):
        self._publisher = publisher

    def stored(self, keys: Sequence[bytes], tokens: np.ndarray, places: Sequence[int]) -> None:
        """Do as ``prefix_cache.Listener``: an event for each row of blocks, with the hash of the block before it."""
        for first, last in rows(places):
            self._publisher.publish_stored(
                tokens[first * BLOCK : last * BLOCK + 1].tolist(),
                [BLOCK] * (last - first),
                [block_hash(key) for key in keys[first:last]],
                block_hash(keys[first - 1]) if first else None,
                is_eagle=True,
            )

    def removed(self, keys: Sequence[bytes]) -> None:
        """Do as ``prefix_cache.Listener``."""
        self._publisher.publish_removed([block_hash(key) for key in keys])


def block_hash(key: bytes) -> int:
    """Return a key's first 64 bits, as Dynamo has block hashes: signed."""
    return int.from_bytes(key[:8], "little", signed=True)


def rows(places: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield first and last + 1 of the places that follow each other in ``places``, which ascend."""
    for i, place in enumerate(places):
        if i == 0 or place != places[i - 1] + 1:
            first = place
        if i + 1 == len(places) or places[i + 1] != place + 1:
            yield first, place + 1
