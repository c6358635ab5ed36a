"""The candidates of one iteration: what the draft's network and all other sources propose, in one super-tree."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from echo_trt.speculation.arrays import compiled
from echo_trt.speculation.chains import Chains
from echo_trt.speculation.goodput.model.acceptance import Acceptance
from echo_trt.speculation.goodput.optimiser.merge import Merged, merge
from echo_trt.speculation.sources import BOTH, DRAFT, DRAFT_SOURCES
from echo_trt.speculation.super_tree import SuperTree

#: Returns sources' chains that continue a tree's leaves, from the tree and its nodes' P(accept) float64 [n].
ContinueLeaves = Callable[[SuperTree, np.ndarray], Sequence[Chains]]
LEAST_LEFT = 0.02  # probability that a head leaves to other tokens, however sure it is
_FORCED = np.array([source.forced for source in DRAFT_SOURCES])


class Candidates:
    """A super-tree with probability float64 [n], P(accept), and value float64 [n], tokens weighted by request.

    The chains that sources propose below roots are merged first, and stand right behind the roots. If the head proposes
    a token of theirs too, one node stays, and its probability rises to 1 - (1 - q)(1 - a), as of two independent
    proposals. If the head proposes other tokens, of probability q together, the chain's token loses by Bayes' rule: if
    it is right, the head misses it with probability 1 - q.
    """

    def __init__(
        self,
        tree: SuperTree,
        acceptance: Acceptance,
        weights: np.ndarray,
        max_draft_len: np.ndarray,
        proposals: Sequence[Chains] = (),
        one_path: bool = False,
        continue_leaves: ContinueLeaves = lambda tree, probability: (),
    ):
        """Begin with the roots of ``tree`` and the chains of ``proposals`` below them.

        one_path  keep only the likelier child of a node; the other child and its descendants get probability 0
        """
        self.tree, self.weights, self._acceptance, self._max_draft_len = tree, weights, acceptance, max_draft_len
        self._one_path, self._continue_leaves = one_path, continue_leaves
        self.probability = np.ones(len(tree))
        self._expandable = np.ones(len(tree), bool)  # its parent was expanded, so a head can expand it
        self._continuations: Merged | None = None  # of the leaves of the present tree
        self._proposed = merge(tree, self.probability, proposals, max_draft_len, one_path)
        if len(self._proposed.parent):
            nodes = len(tree) + np.arange(len(self._proposed.parent))
            self._proposed.join(tree)
            self._extend(np.zeros(len(nodes)), expandable=False)
            self._rescore(nodes)

    @property
    def value(self) -> np.ndarray:
        """Expected tokens, weighted by request: float64 [n]."""
        value: np.ndarray = self.probability * self.weights[self.tree.request]
        return value

    def add(self, parents: np.ndarray, log_q: np.ndarray, tokens: np.ndarray, width: int) -> None:
        """Add the head's children of ``parents`` int64 [F]: log q and tokens [F, k], best first, ``width`` at most."""
        tree, token = self.tree, np.ascontiguousarray(tokens[:, :width], np.int64)
        log_q = np.array(log_q[:, :width], np.float64)
        fits, proposed = self._max_draft_len[tree.request[parents]] > tree.depth[parents], self._proposed
        known = tree.num_requests, proposed.parent, proposed.end, proposed.log_p
        parent, new, score, same, change, agrees = _children(parents, fits, known, token, log_q, tree.token, tree.score)
        if len(same):
            self._reweight(same, change, agrees)
        nodes = tree.add(parent, new, score, DRAFT)
        # Tables are fitted depth by depth; a path cannot be likelier than its beginning.
        self._extend(np.minimum(self._calibrated(nodes), self.probability[parent]), expandable=True)
        if self._one_path and len(proposed.parent):
            self._drop_challengers(nodes)

    def continuations(self) -> Merged:
        """Return what hangs under the current leaves at no cost, cached until the tree grows."""
        if self._continuations is None:
            chains = self._continue_leaves(self.tree, self.probability)
            found = merge(self.tree, self.probability, chains, self._max_draft_len, self._one_path)
            self._continuations = found
        return self._continuations

    def append_continuations(self) -> None:
        """Add these continuations to the tree. Nothing is drafted below them."""
        found = self.continuations()
        found.join(self.tree)
        self._extend(found.probability, expandable=False)

    def frontier(self, depth: int, beams: int) -> np.ndarray:
        """Return nodes of ``depth`` that may be expanded, best first, at most ``beams`` per request: int64 [F]."""
        tree = self.tree
        worth, max_draft_len = self._expandable & (self.probability > 0), self._max_draft_len
        nodes = _of_depth(tree.depth, tree.request, worth, max_draft_len, depth)
        return tree.best_first(nodes, self.value[nodes], np.full(tree.num_requests, beams))

    def promising(self, depth: int, maximum: int) -> np.ndarray:
        """Return the nodes of ``depth`` among the ``maximum`` best candidates, ascending: int64 [F].

        A child's value is at most its parent's, so expanding these nodes alone, depth by depth, finds the ``maximum``
        best nodes of all trees: best-first search (DDTree, arXiv 2604.12989).
        """
        value, roots = self.value, self.tree.num_requests
        minimum = np.partition(value[roots:], -maximum)[-maximum] if len(value) - roots > maximum > 0 else 0.0
        worth = self._expandable & (self.probability > 0) & (value >= minimum)
        return _of_depth(self.tree.depth, self.tree.request, worth, self._max_draft_len, depth)

    def _extend(self, probability: np.ndarray, expandable: bool) -> None:
        """Note the ``probability`` float64 [m] of nodes that the tree has got."""
        self._continuations = None
        self.probability = np.concatenate((self.probability, probability))
        self._expandable = np.concatenate((self._expandable, np.full(len(probability), expandable)))

    def _reweight(self, nodes: np.ndarray, change: np.ndarray, agrees: np.ndarray) -> None:
        """Raise the proposed ``nodes`` int64 [m] that the head proposed too, lower the others, and all below them.

        change float64 [m], of log P(accept). agrees bool [m]: whether the head proposed a node's token.
        """
        self._expandable[nodes] = True
        tree = self.tree
        free = ~_FORCED[tree.source[nodes]]
        nodes = nodes[free]
        tree.source[nodes[agrees[free]]] = BOTH
        self._rescore(_shift(tree.score, nodes, change[free], tree.num_requests, self._proposed.end))

    def _drop_challengers(self, nodes: np.ndarray) -> None:
        """Keep the likelier of the head's new ``nodes`` int64 [m] and the proposed nodes under the same parents."""
        tree, roots, proposed = self.tree, self.tree.num_requests, self._proposed
        below = np.full(roots + len(proposed.parent), -1)
        below[proposed.parent] = roots + np.arange(len(proposed.parent))  # one child at most
        parent = tree.parent[nodes]
        challenger = np.where(parent < len(below), below[np.minimum(parent, len(below) - 1)], -1)
        nodes, challenger = nodes[challenger >= 0], challenger[challenger >= 0]
        copied = self.probability[challenger] > self.probability[nodes]
        self.probability[nodes[copied]] = 0
        for node in challenger[~copied].tolist():
            self.probability[node : proposed.end[node - roots]] = 0

    def _calibrated(self, nodes: np.ndarray) -> np.ndarray:
        tree = self.tree
        return self._acceptance.probability(tree.source[nodes], tree.depth[nodes], tree.score[nodes])

    def _rescore(self, nodes: np.ndarray) -> None:
        """Set the probabilities of proposed ``nodes`` int64 [m], each behind its parent, by their scores."""
        _fall(self.probability, self.tree.parent, nodes, self._calibrated(nodes))


@compiled("void(f8[::1], i8[::1], i8[::1], f8[::1])")
def _fall(probability: np.ndarray, parent: np.ndarray, nodes: np.ndarray, found: np.ndarray) -> None:
    """Set the ``probability`` of ``nodes`` to what was ``found``, at most their parents'."""
    for i in range(len(nodes)):
        probability[nodes[i]] = min(found[i], probability[parent[nodes[i]]])


@compiled("i8[::1](f4[::1], i8[::1], f8[::1], i8, i8[::1])")
def _shift(score: np.ndarray, nodes: np.ndarray, change: np.ndarray, first: int, end: np.ndarray) -> np.ndarray:
    """Add ``change`` to the scores of ``nodes`` and of those below them; return all of these.

    end  int64, by proposed node from ``first`` on, as of ``Merged``
    """
    count = 0
    for node in nodes:
        count += end[node - first] - node
    changed, count = np.empty(count, np.int64), 0
    for i in range(len(nodes)):
        for node in range(nodes[i], end[nodes[i] - first]):
            score[node] += np.float32(change[i])
            changed[count] = node
            count += 1
    return changed


@compiled("i8[::1](i8[::1], i8[::1], b1[::1], i8[::1], i8)")
def _of_depth(
    depth: np.ndarray, request: np.ndarray, worth: np.ndarray, max_draft_len: np.ndarray, level: int
) -> np.ndarray:
    """Return nodes of depth ``level`` that are ``worth`` it, of requests with ``max_draft_len`` for their children."""
    nodes, number = np.empty(len(depth), np.int64), 0
    for node in range(len(depth)):
        if depth[node] == level and worth[node] and max_draft_len[request[node]] > level:
            nodes[number] = node
            number += 1
    return nodes[:number]


@compiled()
def _sibling(node: int, above: np.ndarray, end: np.ndarray, first: int) -> int:
    """Return the next proposed child of a proposed node's parent, -1 none."""
    after: int = end[node - first]
    return after if after < first + len(above) and above[after - first] == above[node - first] else -1


@compiled()
def _with_token(node: int, token: int, known_token: np.ndarray, above: np.ndarray, end: np.ndarray, first: int) -> int:
    """Return ``node`` or the sibling behind it that has ``token``, -1 none."""
    while node >= 0 and known_token[node] != token:
        node = _sibling(node, above, end, first)
    return node


@compiled(
    "Tuple((i8[::1], i8[::1], f8[::1], i8[::1], f8[::1], b1[::1]))"
    "(i8[::1], b1[::1], Tuple((i8, i8[::1], i8[::1], f8[::1])), i8[:, ::1], f8[:, ::1], i8[::1], f4[::1])"
)
def _children(
    parents: np.ndarray,
    fits: np.ndarray,
    proposed: tuple,
    token: np.ndarray,
    log_q: np.ndarray,
    known_token: np.ndarray,
    known_score: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the new ones of the head's children [F, k] of ``parents`` [F]: their parents, tokens and scores [m].

    Also returns the proposed children of ``parents``, int64 [c], the changes of their log P(accept) float64 [c], and
    whether the head proposes them, bool [c]. In ``log_q`` low precision may have rounded log 1 to above 0, which is 0
    again, or overflowed to nan, which is -inf: no child.

    proposed  number of roots, and parent, end and log P(accept) of the proposed nodes behind them, as of ``Merged``
    """
    first, above, end, chance = proposed
    size, number, count = token.size, 0, 0
    parent, new, score = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size)
    nodes, change, agrees = np.empty(len(above), np.int64), np.empty(len(above)), np.zeros(len(above), np.bool_)
    begin = np.full(first, -1)  # of roots, their first proposed child
    for node in range(len(above) - 1, -1, -1):
        if above[node] < first:
            begin[above[node]] = first + node
    for i in range(len(parents)):
        up, left = parents[i], 1.0
        child = begin[up] if up < first else up + 1
        if child < first or child >= first + len(above) or above[child - first] != up:
            child = -1
        for k in range(token.shape[1] if fits[i] else 0):
            log_q[i, k] = -np.inf if math.isnan(log_q[i, k]) else min(log_q[i, k], 0.0)
            if log_q[i, k] == -np.inf:
                continue
            q = math.exp(log_q[i, k]) if child >= 0 else 0.0
            left -= q
            node = _with_token(child, token[i, k], known_token, above, end, first)
            if node >= 0:
                log_a = chance[node - first]
                nodes[count], change[count] = node, math.log1p(-(1 - q) * (1 - math.exp(log_a))) - log_a
                agrees[count] = True
                count += 1
            else:
                parent[number], new[number], score[number] = up, token[i, k], known_score[up] + log_q[i, k]
                number += 1
        left, same = max(left, LEAST_LEFT), nodes[:count][agrees[:count]]
        while child >= 0:
            if not (same == child).any():
                a = math.exp(chance[child - first])
                nodes[count], change[count] = child, math.log(left / (a * left + 1 - a))
                count += 1
            child = _sibling(child, above, end, first)
    return parent[:number], new[:number], score[:number], nodes[:count], change[:count], agrees[:count]
