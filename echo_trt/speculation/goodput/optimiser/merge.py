"""Chains of several sources as parts of one tree: shared beginnings become one node, and chances are combined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from echo_trt.speculation.arrays import compiled
from echo_trt.speculation.chains import Chains
from echo_trt.speculation.super_tree import SuperTree

SURE = 0.999  # P(a token is accepted) at most, where several exclude each other


@dataclass(frozen=True)
class Merged:
    """The m nodes of chains below a tree of n nodes, as its nodes n to n + m - 1: depth first, below a node its own.

    above   int64 [m], the node of the tree under which a node's chain hangs
    parent  int64 [m], and
    end     int64 [m], the node behind the last one below a node
    token, request, depth, score, source: as of ``SuperTree``; the score is log P(accept) of the path
    log_p   float64 [m], log P(a token is accepted, if those before it are)
    """

    above: np.ndarray
    parent: np.ndarray
    end: np.ndarray
    token: np.ndarray
    request: np.ndarray
    depth: np.ndarray
    score: np.ndarray
    source: np.ndarray
    log_p: np.ndarray

    @property
    def probability(self) -> np.ndarray:
        """P(accept) of the nodes: float64 [m]."""
        probability: np.ndarray = np.exp(self.score)
        return probability

    def join(self, tree: SuperTree) -> None:
        """Add the nodes to ``tree``, which has not grown since."""
        tree.add_chains(self.parent, self.token, self.request, self.depth, self.score, self.source)


_NONE = np.zeros(0, np.int64)
NOTHING = Merged(_NONE, _NONE, _NONE, _NONE, _NONE, _NONE, np.zeros(0), np.zeros(0, np.int8), np.zeros(0))


def merge(
    tree: SuperTree,
    probability: np.ndarray,
    proposals: Sequence[Chains],
    max_draft_len: np.ndarray,
    one_path: bool = False,
) -> Merged:
    """Merge all sources' chains below nodes of ``tree``, as far as ``max_draft_len`` int64 [B] goes.

    Two sources that propose one token are independent: it is accepted unless both are wrong, and named after the
    likelier. Of different tokens below a node one is accepted at most, which lowers each by the odds of the others.

    probability  float64 [n], P(accept) of the tree's nodes
    one_path     below a node stands the chain alone of which most tokens are expected
    """
    found = [chains for chains in proposals if chains.tokens.size]
    if not found:
        return NOTHING
    chains = found[0] if len(found) == 1 else Chains.joined(found)
    if one_path and len(np.unique(chains.above)) < len(chains.above):
        chains = chains.best_below_each()
    above = np.ascontiguousarray(chains.above, np.int64)
    arrays = _merge(
        above,
        np.argsort(above, kind="stable"),
        np.ascontiguousarray(chains.tokens, np.int64),
        np.ascontiguousarray(chains.log_p, np.float64),
        np.ascontiguousarray(chains.source, np.int8),
        (tree.request, tree.depth, probability, max_draft_len),
    )
    return Merged(*arrays)


@compiled()
def _in_order(order: np.ndarray, above: np.ndarray, tokens: np.ndarray) -> None:
    """Sort ``order`` int64 [m], chains by the node above them, within such a node by their tokens."""
    for end in range(1, len(order)):
        chain, position = order[end], end
        while position > 0 and above[order[position - 1]] == above[chain]:
            before, column = order[position - 1], 0
            while column < tokens.shape[1] - 1 and tokens[before, column] == tokens[chain, column]:
                column += 1
            if tokens[before, column] <= tokens[chain, column]:
                break
            order[position] = before
            position -= 1
        order[position] = chain


@compiled()
def _exclude(parent: np.ndarray, chance: np.ndarray, first: int) -> None:
    """Lower the log chances float64 [m] of siblings, of which one is right at most, by Bayes' rule."""
    odds, children = np.zeros(first + len(parent)), np.zeros(first + len(parent), np.int64)
    for node in range(len(parent)):
        p = min(math.exp(chance[node]), SURE)
        odds[parent[node]] += p / (1 - p)
        children[parent[node]] += 1
    for node in range(len(parent)):
        if children[parent[node]] > 1:
            p = min(math.exp(chance[node]), SURE)
            chance[node] = math.log(p / (1 - p) / (1 + odds[parent[node]]))


@compiled(
    "Tuple((i8[::1], i8[::1], i8[::1], i8[::1], i8[::1], i8[::1], f8[::1], i1[::1], f8[::1]))"
    "(i8[::1], i8[::1], i8[:, ::1], f8[:, ::1], i1[::1], Tuple((i8[::1], i8[::1], f8[::1], i8[::1])))"
)
def _merge(
    above: np.ndarray, order: np.ndarray, tokens: np.ndarray, log_p: np.ndarray, source: np.ndarray, tree: tuple
) -> tuple:
    """Return the arrays of ``Merged``; ``order``: chains by ``above``."""
    request, depth, probability, max_draft_len = tree
    first, count, length = len(request), 0, tokens.shape[1]
    _in_order(order, above, tokens)
    hangs, parent, end = (
        np.empty(tokens.size, np.int64),
        np.empty(tokens.size, np.int64),
        np.empty(tokens.size, np.int64),
    )
    token, by = np.empty(tokens.size, np.int64), np.empty(tokens.size, np.int8)
    best, chance = np.empty(tokens.size), np.empty(tokens.size)
    path, before, known = np.empty(length, np.int64), np.int64(-1), 0  # nodes of the chain before, and their number
    for chain in order:
        leaf, same = above[chain], True
        room = min(length, max_draft_len[request[leaf]] - depth[leaf])
        known = known if before == leaf else 0
        before, level = leaf, 0
        while level < room and tokens[chain, level] >= 0:
            p = log_p[chain, level]
            same = same and level < known and token[path[level]] == tokens[chain, level]
            if same:
                node = path[level]
                chance[node] = math.log1p(-(1 - math.exp(chance[node])) * (1 - math.exp(p)))
                if p > best[node]:
                    best[node], by[node] = p, source[chain]
            else:
                parent[count] = first + path[level - 1] if level else leaf
                hangs[count], token[count], end[count] = leaf, tokens[chain, level], first + count + 1
                best[count], chance[count], by[count] = p, p, source[chain]
                path[level] = count
                count += 1
            level += 1
        known = level
    _exclude(parent[:count], chance[:count], first)
    score, owner, deep = np.empty(count), np.empty(count, np.int64), np.empty(count, np.int64)
    for node in range(count):
        up = parent[node]
        inner = up >= first
        score[node] = (score[up - first] if inner else math.log(probability[up])) + chance[node]
        owner[node], deep[node] = request[hangs[node]], (deep[up - first] if inner else depth[up]) + 1
    for node in range(count - 1, -1, -1):
        if parent[node] >= first:
            end[parent[node] - first] = max(end[parent[node] - first], end[node])
    return hangs[:count], parent[:count], end[:count], token[:count], owner, deep, score, by[:count], chance[:count]
