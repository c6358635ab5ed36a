"""The prefix cache: KV blocks of text that was computed before, found again by that text.

A block's key is a hash of all tokens up to its end and of the one that follows them. The target's KV rows and features
depend on the tokens up to the block's end alone; the last entry of an EAGLE-3 head, token j+1 beside the features of
token j, depends on the following one too. So requests that find a block may share what both networks keep in it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Protocol

import numpy as np

from echo_trt.speculation.pack import BLOCK

DIGEST = 16  # bytes: of so many bits of BLAKE2, nobody finds two texts with one key


class Listener(Protocol):
    """Receives the keys that the cache gains and loses, on the engine's thread; it must not block."""

    def stored(self, keys: Sequence[bytes], tokens: np.ndarray, indices: Sequence[int]) -> None:
        """Blocks can be found from now on.

        keys     of a text's blocks, from its beginning
        tokens   int32 [>= 32 len(keys) + 1], that text
        indices  indices into ``keys`` of the blocks that are new, in order
        """

    def removed(self, keys: Sequence[bytes]) -> None:
        """Blocks of these keys can be found no longer."""


def rows(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield first and last + 1 of the places that follow each other in ``indices``, which ascend."""
    for i, index in enumerate(indices):
        if i == 0 or index != indices[i - 1] + 1:
            first = index
        if i + 1 == len(indices) or indices[i + 1] != index + 1:
            yield first, index + 1


class PrefixCache:
    """Which blocks hold which text, and how many requests hold each.

    A block that no request holds is idle: it stays until its memory is needed. Eviction is least recently used first,
    and within one text last block first, since a block is found only through the blocks before it.
    """

    def __init__(self, enabled: bool = True):
        """Without ``enabled`` no text has keys, so that nothing is kept or found."""
        self.enabled = enabled
        self.listener: Listener | None = None
        self.added = self.evicted = 0  # blocks so far
        self._block: dict[bytes, int] = {}
        self._key: dict[int, bytes] = {}
        self._holders: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # in the order of eviction

    @property
    def idle(self) -> int:
        return len(self._idle)

    def extend(self, keys: list[bytes], tokens: np.ndarray, blocks: int, salt: bytes = b"") -> None:
        """Append the missing keys of the first ``blocks`` blocks of ``tokens``, int32, which has one token more than
        these blocks. Texts of another ``salt`` have other keys.
        """
        for i in range(len(keys), blocks if self.enabled else 0):
            text = tokens[i * BLOCK : (i + 1) * BLOCK + 1].tobytes()
            keys.append(hashlib.blake2b((keys[-1] if keys else salt) + text, digest_size=DIGEST).digest())

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """Return the blocks of ``keys``, up to the first unknown one."""
        return [self._block[key] for key in takewhile(self._block.__contains__, keys)]

    def idle_of(self, blocks: Sequence[int]) -> int:
        return sum(block in self._idle for block in blocks)

    def hold(self, blocks: Sequence[int]) -> None:
        """One more request holds these blocks, which were found."""
        for block in blocks:
            self._holders[block] += 1
            self._idle.pop(block, None)

    def add(self, keys: Sequence[bytes], blocks: Sequence[int], tokens: np.ndarray) -> None:
        """Add ``blocks`` of a request, full of the text of ``keys``. A known text keeps its known block.

        tokens  int32 [>= 32 len(keys) + 1], the text
        """
        new = []
        for position, (key, block) in enumerate(zip(keys, blocks, strict=True)):
            if key not in self._block:
                self._block[key], self._key[block], self._holders[block] = block, key, 1
                new.append(position)
        self.added += len(new)
        if new and self.listener:
            self.listener.stored(keys, tokens, new)

    def leave(self, keys: Sequence[bytes], blocks: Sequence[int]) -> list[int]:
        """Release ``blocks`` of a request; the first of them are full of the text of ``keys``, which were added.

        Returns those blocks that nobody can find, and so are free.
        """
        known = [block for block in blocks if block in self._key]
        for block in known:
            self._holders[block] -= 1
            if not self._holders[block]:
                self._idle[block] = None
        for key in reversed(keys):  # other requests' blocks too: a text's first blocks must stay as long as its last
            if self._block[key] in self._idle:
                self._idle.move_to_end(self._block[key])
        return [block for block in blocks if block not in self._key]

    def evict(self, count: int) -> list[int]:
        """Forget so many idle blocks; returns them."""
        self.evicted += count
        return self.forget(count)

    def forget(self, count: int) -> list[int]:
        blocks = [self._idle.popitem(last=False)[0] for _ in range(count)]
        keys = [self._key.pop(block) for block in blocks]
        for block, key in zip(blocks, keys, strict=True):
            del self._block[key], self._holders[block]
        if keys and self.listener:
            self.listener.removed(keys)
        return blocks
