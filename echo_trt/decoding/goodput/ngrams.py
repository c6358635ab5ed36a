"""N-grams: what the target has usually written after the last few tokens.

A table made of its own answers continues the leaves of a tree at no cost, beyond where a draft has gone: retrieval as
in REST (arXiv 2311.08252), under a draft's nodes instead of alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from echo_trt.decoding.arrays import compiled
from echo_trt.decoding.super_tree import SuperTree

LEAVES = 256  # of a batch, the best, that are continued
LEAST = 0.015  # of P(accept): what is worth less is not looked for
SUREST = 0.995  # of a chance
_EMPTY = np.uint64(0)  # of a slot: a key of 0 is no context's
_SEED = 0xD1B54A32D192ED03  # a state unlike any token, or two contexts could meet


@dataclass(frozen=True)
class Chains:
    """Nodes [m] to be added to a tree, under its leaves and each other, parents before children, in this order.
    ``leaf``: the one under which each stands."""

    leaf: np.ndarray
    parent: np.ndarray
    token: np.ndarray
    request: np.ndarray
    depth: np.ndarray
    probability: np.ndarray


class NGrams:
    """``keys`` uint32 [n], ascending: of contexts (``context_keys``) of up to ``longest`` tokens; ``tokens`` [n]: what
    followed each in most texts; ``chances`` [n]: the probability that it does."""

    def __init__(self, keys: np.ndarray, tokens: np.ndarray, chances: np.ndarray, longest: int):
        self.keys, self.longest = np.ascontiguousarray(keys, np.uint32), longest
        self.tokens = np.ascontiguousarray(tokens, np.int64)
        self.chances = np.minimum(chances, SUREST, dtype=np.float64)  # what is certain, no drift would reach
        self._slots = _slots(self.keys)
        self._shift = 33 - len(self._slots).bit_length()  # of a key, to its slot

    def __len__(self) -> int:
        return len(self.keys)

    def look_up(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What follows contexts of ``keys`` uint32 [n, ``longest``], the shortest first, 0 where there are none: tokens
        [n], -1 where nothing is known, and chances [n]. The longest context that is known says most."""
        token, chance = np.full(len(keys), -1), np.zeros(len(keys))
        for size in range(self.longest if len(self) else 0):
            place = np.searchsorted(self.keys, keys[:, size]).clip(max=len(self) - 1)
            found = (self.keys[place] == keys[:, size]) & (keys[:, size] > 0)
            token, chance = np.where(found, self.tokens[place], token), np.where(found, self.chances[place], chance)
        return token, chance

    def chains(
        self, tree: SuperTree, probability: np.ndarray, recent: np.ndarray, deepest: np.ndarray, drift: float
    ) -> Chains:
        """What continues the leaves of ``tree``, whose nodes have P(accept) ``probability`` [n].

        recent int64 [B, ``longest``]: the tokens before each root, the last ones, -1 where there are none. deepest [B]:
        the depth that a request's nodes may have. ``drift`` shifts the log-odds of each token.
        """
        leaves = _leaves(tree.parent, probability)
        if len(leaves) > LEAVES:
            leaves = leaves[np.argpartition(-probability[leaves], LEAVES)[:LEAVES]]
        found = _continue(
            (self._slots, self._shift, self.tokens, self.chances, self.longest, math.exp(drift)),
            leaves,
            (tree.token, tree.parent, tree.request, tree.depth, probability),
            np.ascontiguousarray(recent, np.int64),
            np.ascontiguousarray(deepest, np.int64),
        )
        return Chains(*found)


@compiled("u8(u8, i8)")
def _mix(state: np.uint64, token: int) -> np.uint64:
    """The state of a context that is one token longer, towards its beginning."""
    state = (state ^ np.uint64(token)) * np.uint64(0x9E3779B97F4A7C15)
    return state ^ (state >> np.uint64(29))


@compiled("u4(u8)")
def _key(state: np.uint64) -> np.uint32:
    return np.uint32(state >> np.uint64(32))


@compiled("u4[:, ::1](i8[::1], i8)")
def context_keys(text: np.ndarray, longest: int) -> np.ndarray:
    """Keys [L + 1, longest] of the last 1, 2, ... tokens before each place of ``text`` [L]; 0 where there are fewer."""
    keys = np.zeros((len(text) + 1, longest), np.uint32)
    for end in range(1, len(text) + 1):
        state = np.uint64(_SEED)
        for size in range(min(longest, end)):
            state = _mix(state, text[end - 1 - size])
            keys[end, size] = _key(state)
    return keys


@compiled("i8[::1](i8[::1], f8[::1])")
def _leaves(parent: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """Nodes without children that are worth continuing."""
    leaf = probability >= LEAST
    for node in range(len(parent)):
        if parent[node] >= 0:
            leaf[parent[node]] = False
    return np.flatnonzero(leaf)


@compiled("u8[::1](u4[::1])")
def _slots(keys: np.ndarray) -> np.ndarray:
    """A hash table, open addressing: in each slot a key and, in its lower half, its place. Half of them or more are
    empty, so that one line of the cache has the answer, and several lookups wait for memory together. ``keys`` ascend,
    and so do their slots."""
    bits = 1
    while 1 << bits < 2 * len(keys):
        bits += 1
    slots, slot = np.full(1 << bits, _EMPTY), np.int64(-1)
    for place in range(len(keys)):
        slot = max(np.int64(keys[place]) >> (32 - bits), slot + 1)
        while slots[slot & (len(slots) - 1)] != _EMPTY:  # behind the end it goes on at the beginning
            slot += 1
        slots[slot & (len(slots) - 1)] = (np.uint64(keys[place]) << np.uint64(32)) | np.uint64(place)
    return slots


@compiled("i8(u8[::1], i8, u4)")
def _find(slots: np.ndarray, shift: int, key: np.uint32) -> np.int64:
    """The place of ``key``, which ``shift`` takes to its slot, or -1."""
    slot = np.int64(key) >> shift
    while slots[slot] != _EMPTY:
        if np.uint32(slots[slot] >> np.uint64(32)) == key:
            return np.int64(slots[slot] & np.uint64(0xFFFFFFFF))
        slot = (slot + 1) & (len(slots) - 1)
    return np.int64(-1)


_TABLE = "Tuple((u8[::1], i8, i8[::1], f8[::1], i8, f8))"
_TREE = "Tuple((i8[::1], i8[::1], i8[::1], i8[::1], f8[::1]))"
_CHAINS = "Tuple((i8[::1], i8[::1], i8[::1], i8[::1], i8[::1], f8[::1]))"


@compiled(f"{_CHAINS}({_TABLE}, i8[::1], {_TREE}, i8[:, ::1], i8[::1])")
def _continue(table: tuple, leaves: np.ndarray, tree: tuple, recent: np.ndarray, deepest: np.ndarray) -> tuple:
    """``Chains``' columns."""
    slots, shift, follows, chances, longest, odds = table
    token, parent, request, depth, probability = tree
    size = 0
    for leaf in leaves:
        size += max(deepest[request[leaf]] - depth[leaf], 0)
    leaf_of, parents, tokens = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int64)
    requests, depths = np.empty(size, np.int64), np.empty(size, np.int64)
    chance, number = np.empty(size), 0
    for leaf in leaves:
        own, end = request[leaf], longest
        words = np.full(longest + max(deepest[own] - depth[leaf], 0), -1)
        node = leaf
        while node >= 0 and end > 0:
            end -= 1
            words[end] = token[node]
            node = parent[node]
        for back in range(min(end, recent.shape[1])):
            words[end - 1 - back] = recent[own, recent.shape[1] - 1 - back]
        last, p, above = longest, probability[leaf], leaf
        for level in range(depth[leaf] + 1, deepest[own] + 1):
            found, state = np.int64(-1), np.uint64(_SEED)
            for back in range(longest):
                if words[last - 1 - back] < 0:
                    break
                state = _mix(state, words[last - 1 - back])
                place = _find(slots, shift, _key(state))
                found = place if place >= 0 else found  # the longest context that is known says most
            if found < 0:
                break
            p *= chances[found] * odds / (1 - chances[found] + chances[found] * odds)
            if p < LEAST:
                break
            leaf_of[number], parents[number], tokens[number] = leaf, above, follows[found]
            requests[number], depths[number], chance[number] = own, level, p
            above, words[last] = len(token) + number, follows[found]
            last, number = last + 1, number + 1
    few = slice(0, number)
    return leaf_of[few], parents[few], tokens[few], requests[few], depths[few], chance[few]
