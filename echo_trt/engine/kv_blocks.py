"""The blocks of the KV pool: free, held by slots, or cached.

A block's key is a hash of all tokens up to its end and of the one that follows them. The target's KV rows and features
depend on the tokens up to the block's end alone; the last entry of an EAGLE-3 head, token j+1 beside the features of
token j, depends on the following one too. So requests that find a block may share what both networks keep in it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Protocol, TypeVar

import numpy as np

from echo_trt.backends.states import KeptStates
from echo_trt.speculation.arrays import compiled, ragged_arange
from echo_trt.speculation.pack import BLOCK

DIGEST = 16  # bytes: of so many bits of BLAKE2, nobody finds two texts with one key
NEVER = 2**62  # larger than ``added`` of any cache: the slot never searches the cache again

Amount = TypeVar("Amount", int, np.ndarray)


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
        self.added = self.evicted = self.forgotten = 0  # blocks so far
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

    def block_of(self, key: bytes) -> int | None:
        return self._block.get(key)

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
        self.forgotten += count  # last: another thread that copies a block looks here for whether it was one meanwhile
        if keys and self.listener:
            self.listener.removed(keys)
        return blocks


class KVBlocks:
    """Which slots hold which of ``count`` blocks, at per_slot ``table.shape[1]`` each.

    A block is free, or held by slots (by several only where it is full of committed text that they share), or cached:
    full of text that a slot may find there again. The target never writes to shared or cached blocks, because it writes
    after the committed text. A draft's prefill may write to them: it writes the values that they hold, since the text
    is the same.

    table    int32 [S, per_slot], blocks of a slot's text in order; ``held`` int64 [S]: how many
    drafted  bool [blocks], whether the draft's KV of a block's text is in it, too
    keys     of each slot's text's blocks, as far as they are known, with the ``salts`` of these keys
    found    int64 [S], tokens of a slot's text that were in the cache
    looked   int64 [S], ``added`` of the cache when a slot last searched it
    """

    def __init__(self, slots: int, per_slot: int, count: int, prefix_cache: bool, first: int):
        """Begin with all blocks free; they are the engine's from block ``first`` on."""
        self.table, self.held, self.count = np.zeros((slots, per_slot), np.int32), np.zeros(slots, np.int64), count
        self.free = count  # blocks that hold nothing
        self._free = (first + np.arange(count, dtype=np.int32))[::-1].copy()  # a stack
        self.cache, self.drafted = PrefixCache(prefix_cache), np.zeros(first + count, bool)
        self.keys: list[list[bytes]] = [[] for _ in range(slots)]
        self.salts = [b""] * slots
        self.found, self.looked = np.zeros((2, slots), np.int64)
        self.states: KeptStates | None = None  # of a target that goes on from states, too
        self.released: Callable[[Sequence[bytes]], None] = lambda keys: None  # gets the keys of a text that leaves

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
        parts = len(found)  # behind so many blocks the text parts from those that are cached
        if self.states:
            found = found[: self.states.find(keys[:parts])]
        if blocks_for(length + reserve) - len(found) > self.free + self.cached - self.cache.idle_of(found):
            return False
        self.cache.hold(found)
        if self.states:
            self.states.open(slot, keys[: len(found)], {parts, shareable(length)})
        self.keys[slot], self.looked[slot] = keys, self.cache.added if finds else NEVER
        self.salts[slot] = salt
        self.table[slot, : len(found)] = found
        self.held[slot], self.found[slot] = len(found), len(found) * BLOCK
        return self.hold(np.array([slot]), np.array([length]))

    def search(self, slot: int, committed: int, length: int) -> int:
        """Use blocks behind the ``committed`` tokens of a slot's text that others have computed; returns the tokens."""
        if self.states or self.looked[slot] >= self.cache.added:
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
        if self.states:
            return found
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
        if self.states:
            self.states.publish(slot, keys)
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
        self.released(keys)

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
