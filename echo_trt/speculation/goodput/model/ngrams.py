"""N-grams: continuations that the target has usually written after the last few tokens.

A table made of its own answers continues the leaves of a tree at no cost, beyond where a draft has gone: retrieval as
in REST (arXiv 2311.08252), under a draft's nodes instead of alone.
"""

from __future__ import annotations

import math

import numpy as np

from echo_trt.speculation.arrays import compiled
from echo_trt.speculation.chains import Chains
from echo_trt.speculation.sources import NGRAM
from echo_trt.speculation.super_tree import SuperTree

LEAVES = 256  # of a batch that are continued, the best; larger: more continuations of large batches, and more time
SUREST = 0.995  # probability of a next token at most, since a shift moves no certainty
_EMPTY = np.uint64(0)  # content of a free cell: a key of 0 is no context's
SEED = 0xD1B54A32D192ED03  # a state unlike any token, or two contexts could meet


class NGrams:
    """A table from a context (the last 1 to ``longest`` tokens) to its likeliest next token.

    keys uint32 [n], ascending (``key_of``). tokens int64 [n]. chances float64 [n]: P(next token).
    """

    def __init__(self, keys: np.ndarray, tokens: np.ndarray, chances: np.ndarray, longest: int):
        self.keys, self.longest = np.ascontiguousarray(keys, np.uint32), longest
        self.tokens = np.ascontiguousarray(tokens, np.int64)
        self.chances = np.minimum(chances, SUREST, dtype=np.float64)
        self._cells = _cells(self.keys)
        self._shift = 33 - len(self._cells).bit_length()  # of a key, to its cell

    def __len__(self) -> int:
        return len(self.keys)

    def chains(
        self,
        tree: SuperTree,
        probability: np.ndarray,
        recent: np.ndarray,
        deepest: np.ndarray,
        shift: float,
        minimum: float,
    ) -> Chains:
        """Continue the leaves of ``tree``, whose nodes have P(accept) ``probability`` float64 [n].

        recent int64 [B, ...]: the last tokens before a root, -1 none. deepest int64 [B]: the largest depth of a
        request's nodes. ``shift`` is added to the log-odds of next tokens. ``minimum``: P(accept) of a node, at least.
        """
        leaves = _leaves(tree.parent, probability, minimum)
        if len(leaves) > LEAVES:
            leaves = leaves[np.argpartition(-probability[leaves], LEAVES)[:LEAVES]]
        tokens, log_p = _continue(
            (self._cells, self._shift, self.tokens, self.chances, self.longest, math.exp(shift)),
            leaves,
            (tree.token, tree.parent, tree.request, tree.depth, probability),
            np.ascontiguousarray(recent[:, -self.longest :], np.int64),
            np.ascontiguousarray(deepest, np.int64),
            minimum,
        )
        return Chains(leaves, tokens, log_p, np.full(len(leaves), NGRAM, np.int8))


@compiled("u8(u8, i8)")
def longer_by(state: np.uint64, token: int) -> np.uint64:
    """Return the state of a context that is one token longer, towards its beginning."""
    state = (state ^ np.uint64(token)) * np.uint64(0x9E3779B97F4A7C15)
    return state ^ (state >> np.uint64(29))


@compiled("u4(u8)")
def key_of(state: np.uint64) -> np.uint32:
    return np.uint32(state >> np.uint64(32))


@compiled("i8[::1](i8[::1], f8[::1], f8)")
def _leaves(parent: np.ndarray, probability: np.ndarray, minimum: float) -> np.ndarray:
    """Return the nodes without children whose P(accept) is ``minimum`` or more: int64 [m]."""
    leaf = probability >= minimum
    for node in range(len(parent)):
        if parent[node] >= 0:
            leaf[parent[node]] = False
    return np.flatnonzero(leaf)


@compiled("u8[::1](u4[::1])")
def _cells(keys: np.ndarray) -> np.ndarray:
    """Make a hash table with open addressing: a cell holds a key and, in its lower half, the key's index.

    Half of the cells or more are empty, so that one line of the cache has the answer, and several lookups wait for
    memory together. ``keys`` ascend, and so do their cells.
    """
    bits = 1
    while 1 << bits < 2 * len(keys):
        bits += 1
    cells, cell = np.full(1 << bits, _EMPTY), np.int64(-1)
    for index in range(len(keys)):
        cell = max(np.int64(keys[index]) >> (32 - bits), cell + 1)
        while cells[cell & (len(cells) - 1)] != _EMPTY:  # behind the end it goes on at the beginning
            cell += 1
        cells[cell & (len(cells) - 1)] = (np.uint64(keys[index]) << np.uint64(32)) | np.uint64(index)
    return cells


@compiled("i8(u8[::1], i8, u4)")
def _find(cells: np.ndarray, shift: int, key: np.uint32) -> np.int64:
    """Return the index of ``key``, which ``shift`` takes to its cell, or -1."""
    cell = np.int64(key) >> shift
    while cells[cell] != _EMPTY:
        if np.uint32(cells[cell] >> np.uint64(32)) == key:
            return np.int64(cells[cell] & np.uint64(0xFFFFFFFF))
        cell = (cell + 1) & (len(cells) - 1)
    return np.int64(-1)


_TABLE = "Tuple((u8[::1], i8, i8[::1], f8[::1], i8, f8))"
_TREE = "Tuple((i8[::1], i8[::1], i8[::1], i8[::1], f8[::1]))"


@compiled()
def _path_text(leaf: int, token: np.ndarray, parent: np.ndarray, recent: np.ndarray, text: np.ndarray) -> None:
    """Write the last tokens up to ``leaf`` into ``text`` int64 [longest].

    They are the path from its root, behind ``recent`` int64 [L]. Places before the beginning keep what they hold.
    """
    end, node = len(text), leaf
    while node >= 0 and end > 0:
        end -= 1
        text[end] = token[node]
        node = parent[node]
    for back in range(min(end, len(recent))):
        text[end - 1 - back] = recent[len(recent) - 1 - back]


@compiled()
def _find_longest(cells: np.ndarray, shift: int, text: np.ndarray) -> np.int64:
    """Return the index of the longest known context that ends ``text`` int64 [longest], -1 none. -1 in it: no token."""
    found, state = np.int64(-1), np.uint64(SEED)
    for back in range(len(text)):
        token = text[len(text) - 1 - back]
        if token < 0:
            break
        state = longer_by(state, token)
        index = _find(cells, shift, key_of(state))
        found = index if index >= 0 else found
    return found


@compiled(f"Tuple((i8[:, ::1], f8[:, ::1]))({_TABLE}, i8[::1], {_TREE}, i8[:, ::1], i8[::1], f8)")
def _continue(
    table: tuple, leaves: np.ndarray, tree: tuple, recent: np.ndarray, deepest: np.ndarray, minimum: float
) -> tuple:
    """Return tokens and log P(accept) of the chains below ``leaves``, as of ``Chains``."""
    cells, shift, follows, chances, longest, odds = table
    token, parent, request, depth, probability = tree
    length = 0
    for leaf in leaves:
        length = max(length, deepest[request[leaf]] - depth[leaf])
    tokens, log_p = np.full((len(leaves), length), -1), np.zeros((len(leaves), length))
    for row in range(len(leaves)):
        leaf = leaves[row]
        owner, p = request[leaf], probability[leaf]
        text = np.full(longest + length, -1)
        _path_text(leaf, token, parent, recent[owner], text[:longest])
        for level in range(deepest[owner] - depth[leaf]):
            found = _find_longest(cells, shift, text[level : longest + level])
            if found < 0:
                break
            chance = chances[found] * odds / (1 - chances[found] + chances[found] * odds)
            p *= chance
            if p < minimum:
                break
            tokens[row, level], log_p[row, level] = follows[found], math.log(chance)
            text[longest + level] = follows[found]
    return tokens, log_p
