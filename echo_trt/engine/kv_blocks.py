"""The blocks of the KV pool: free, held by slots, or cached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from echo_trt.engine.prefix_cache import PrefixCache
from echo_trt.speculation.arrays import compiled, ragged_arange
from echo_trt.speculation.pack import BLOCK

NEVER = 2**62  # larger than ``added`` of any cache: the slot never searches the cache again

Amount = TypeVar("Amount", int, np.ndarray)


class KVBlocks:
    """Which slots hold which of ``count`` blocks, at most ``table.shape[1]`` each.

    A block is free, or held by slots (by several only where it is full of committed text that they share), or cached:
    full of text that a slot may find there again. The target never writes to shared or cached blocks, because it writes
    after the committed text. A draft's prefill may write to them: it writes the values that they hold, since the text
    is the same.

    table    int32 [S, most], blocks of a slot's text in order; ``held`` int64 [S]: how many
    drafted  bool [blocks], whether the draft's KV of a block's text is in it, too
    keys     of each slot's text's blocks, as far as they are known, with the ``salts`` of these keys
    found    int64 [S], tokens of a slot's text that were in the cache
    looked   int64 [S], ``added`` of the cache when a slot last searched it
    """

    def __init__(self, slots: int, most: int, count: int, prefix_cache: bool, first: int):
        """Begin with all blocks free; they are the engine's from block ``first`` on."""
        self.table, self.held, self.count = np.zeros((slots, most), np.int32), np.zeros(slots, np.int64), count
        self.free = count  # blocks that hold nothing
        self._free = (first + np.arange(count, dtype=np.int32))[::-1].copy()  # a stack
        self.cache, self.drafted = PrefixCache(prefix_cache), np.zeros(first + count, bool)
        self.keys: list[list[bytes]] = [[] for _ in range(slots)]
        self.salts = [b""] * slots
        self.found, self.looked = np.zeros((2, slots), np.int64)

    @property
    def cached(self) -> int:
        return self.cache.idle

    @property
    def used(self) -> int:
        return self.count - self.free - self.cached

    def open(self, slot: int, text: np.ndarray, keys: list[bytes], reserve: int, finds: bool, salt: bytes) -> bool:
        """Give a free slot the blocks of a text int32 [n]; ``found`` tokens at its beginning are in the cache.

        keys     of the text's blocks, as far as they are known; more are added, with the ``salt``
        reserve  tokens behind the text that there must be room for, else: False
        finds    whether cached blocks are used
        """
        length = len(text)
        self.cache.extend(keys, text, shareable(length), salt)
        found = self.cache.find(keys[: shareable(length)]) if finds else []
        if blocks_for(length + reserve) - len(found) > self.free + self.cached - self.cache.idle_of(found):
            return False
        self.cache.hold(found)
        self.keys[slot], self.looked[slot] = keys, self.cache.added if finds else NEVER
        self.salts[slot] = salt
        self.table[slot, : len(found)] = found
        self.held[slot], self.found[slot] = len(found), len(found) * BLOCK
        return self.hold(np.array([slot]), np.array([length]))

    def search(self, slot: int, committed: int, length: int) -> int:
        """Use blocks behind the ``committed`` tokens of a slot's text that others have computed; returns the tokens."""
        if self.looked[slot] >= self.cache.added:
            return 0
        first, self.looked[slot] = committed // BLOCK, self.cache.added
        found = self.cache.find(self.keys[slot][first : shareable(length)])
        if not found:
            return 0
        span = slice(first, first + len(found))
        self.cache.hold(found)
        self._give(self.table[slot, span])
        self.table[slot, span] = found
        self.found[slot] += span.stop * BLOCK - committed
        return span.stop * BLOCK - committed

    def awaits(self, slots: np.ndarray, committed: np.ndarray, worth: int) -> list[int]:
        """Return which of ``slots`` will find ``worth`` tokens or more in blocks that one before them computes."""
        needed, before, found = -(-worth // BLOCK), list[list[bytes]](), list[int]()
        for i, slot in enumerate(slots.tolist()):  # a prompt's blocks are found once all of it is computed
            keys, last = self.keys[slot], int(committed[i]) // BLOCK + needed - 1
            # A key is of all the text up to its block, so one says that all before it are alike.
            searches = self.looked[slot] != NEVER and last < len(keys)
            if searches and any(last < len(others) and others[last] == keys[last] for others in before):
                found.append(i)
            before.append(keys)
        return found

    def publish(self, slot: int, text: np.ndarray, full: int) -> list[bytes]:
        """Let others find the first ``full`` blocks of a slot's text int32 [n]; returns their keys."""
        self.cache.extend(self.keys[slot], text, full, self.salts[slot])
        keys = self.keys[slot][:full]
        self.cache.add(keys, self.table[slot, : len(keys)].tolist(), text)
        return keys

    def hold(self, slots: np.ndarray, lengths: np.ndarray) -> bool:
        """Give slots the blocks for ``lengths`` tokens, all or none. False: the pool is too empty."""
        wanted = np.maximum(blocks_for(lengths) - self.held[slots], 0)
        total = int(wanted.sum())
        if total == 0:  # most iterations
            return True
        if total > self.free + self.cached:
            return False
        if total > self.free:
            self._give(self.cache.evict(total - self.free))
        self.free -= total
        owners, columns = np.repeat(slots, wanted), np.repeat(self.held[slots], wanted) + ragged_arange(wanted)
        self.table[owners, columns] = self._free[self.free : self.free + total]
        self.drafted[self.table[owners, columns]] = False
        self.held[slots] += wanted
        return True

    def release(self, slot: int, keys: Sequence[bytes]) -> None:
        """Free a slot's blocks; the first ones, published by ``keys``, stay in the cache."""
        self._give(self.cache.leave(keys, self.table[slot, : self.held[slot]].tolist()))
        self.held[slot] = 0

    def forget_cached(self) -> None:
        """Empty the cache, before something writes over the pool."""
        self._give(self.cache.forget(self.cache.idle))

    def _give(self, blocks: Sequence[int] | np.ndarray) -> None:
        self._free[self.free : self.free + len(blocks)] = blocks
        self.free += len(blocks)

    def rows(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Pool rows of token ``positions`` [m] of ``slots`` [m]; row r is block r // BLOCK, r % BLOCK."""
        return _rows(self.table, slots, positions)


def blocks_for(tokens: Amount) -> Amount:
    """Return the blocks that hold ``tokens``; an int or an array."""
    blocks: Amount = -(-tokens // BLOCK)
    return blocks


def shareable(length: int) -> int:
    """Return how many blocks of a text of ``length`` tokens may come from the cache: the last two tokens are always
    computed.
    """
    return max(length - 2, 0) // BLOCK


@compiled("i8[::1](i4[:, ::1], i8[::1], i8[::1])")
def _rows(table: np.ndarray, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
    rows = np.empty(len(slots), np.int64)
    for i in range(len(slots)):
        rows[i] = np.int64(table[slots[i], positions[i] // BLOCK]) * BLOCK + positions[i] % BLOCK
    return rows
