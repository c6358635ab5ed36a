"""The candidates of one iteration: what the head drafts, the text itself suggests, and n-grams, in one super-tree."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from echo_trt.speculation.arrays import compiled
from echo_trt.speculation.chains import NO_CHAINS, Chains
from echo_trt.speculation.goodput.model.acceptance import Acceptance
from echo_trt.speculation.sources import BOTH, DRAFT, GRAMMAR
from echo_trt.speculation.super_tree import SuperTree

#: Returns the chains that continue a tree's leaves, from the tree and its nodes' P(accept) float64 [n].
ContinueLeaves = Callable[[SuperTree, np.ndarray], Chains]


@dataclass(frozen=True)
class Continuations:
    """The tokens of ``chains`` for which there is room: their ``chain`` and ``index`` int64 [m], and P(accept)."""

    chains: Chains
    chain: np.ndarray
    index: np.ndarray
    probability: np.ndarray

    @property
    def leaf(self) -> np.ndarray:
        """The tree's leaf above each: int64 [m]."""
        leaf: np.ndarray = self.chains.above[self.chain]
        return leaf


class Candidates:
    """A super-tree with probability float64 [n], P(accept), and value float64 [n], tokens weighted by request.

    Copied chains are attached to the roots first. If the head proposes the copied token too, one node stays, and its
    probability rises to 1 - (1 - q)(1 - a), as of two independent proposals. If the head proposes other tokens, of
    probability q together, the copied token's probability falls by Bayes' rule: if the copied token is right, the head
    misses it with probability 1 - q.
    """

    def __init__(
        self,
        tree: SuperTree,
        acceptance: Acceptance,
        weights: np.ndarray,
        max_draft_len: np.ndarray,
        copied: Chains | None = None,
        one_path: bool = False,
        continue_leaves: ContinueLeaves = lambda tree, probability: NO_CHAINS,
    ):
        """Begin with the roots of ``tree`` and the chains of ``copied``, one per root.

        one_path  keep only the likelier child of a node; the other child and its descendants get probability 0
        """
        self.tree, self.weights, self._acceptance, self._max_draft_len = tree, weights, acceptance, max_draft_len
        self._one_path, self._continue_leaves = one_path, continue_leaves
        self.probability = np.ones(len(tree))
        self._expandable = np.ones(len(tree), bool)  # its parent was expanded, so a head can expand it
        self._copy_under = np.full(len(tree), -1)  # node -> its copied child
        self._chain = np.zeros((0, 0), np.int64)  # [B, L]: nodes of the copied chains, -1 beyond a chain's end
        self._continuations: Continuations | None = None  # of the leaves of the present tree
        if copied is not None:
            self._attach(copied)

    @property
    def value(self) -> np.ndarray:
        """Expected tokens, weighted by request: float64 [n]."""
        value: np.ndarray = self.probability * self.weights[self.tree.request]
        return value

    def add(self, parents: np.ndarray, log_q: np.ndarray, tokens: np.ndarray, width: int) -> None:
        """Add the head's children of ``parents`` int64 [F]: log q and tokens [F, k], best first, ``width`` at most."""
        tree, token = self.tree, np.ascontiguousarray(tokens[:, :width], np.int64)
        log_q = np.array(log_q[:, :width], np.float64)
        fits = self._max_draft_len[tree.request[parents]] > tree.depth[parents]
        copy = self._copy_under[parents]
        parent, new, score, same = _children(parents, fits, copy, token, log_q, tree.token, tree.score)
        if self._chain.size:
            self._reweight_copies(copy, same, log_q)
        nodes = tree.add(parent, new, score, DRAFT)
        # Tables are fitted depth by depth; a path cannot be likelier than its beginning.
        self._extend(np.minimum(self._calibrated(nodes), self.probability[parent]), expandable=True)
        if self._one_path and self._chain.size:
            self._drop_challengers(nodes)

    def continuations(self) -> Continuations:
        """Return what hangs under the current leaves at no cost, cached until the tree grows."""
        if self._continuations is None:
            chains = self._continue_leaves(self.tree, self.probability)
            chain, index = self._within_draft_len(chains)
            probability = self.probability[chains.above, None] * np.exp(chains.log_p.cumsum(axis=1))
            self._continuations = Continuations(chains, chain, index, probability[chain, index])
        return self._continuations

    def append_continuations(self) -> None:
        """Add these continuations to the tree. Nothing is drafted below them."""
        found = self.continuations()
        self._add_chains(found.chains, found.chain, found.index, np.log(found.probability))
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

    def _attach(self, copied: Chains) -> None:
        """Hang the copied chains under the roots, request by request, as far as texts and room go."""
        request, index = self._within_draft_len(copied)
        if len(request) == 0:
            return
        nodes, parent = self._add_chains(copied, request, index, copied.log_p.cumsum(axis=1)[request, index])
        self._extend(np.zeros(len(nodes)), expandable=False)
        self._chain = np.full(copied.tokens.shape, -1)
        self._chain[request, index] = nodes
        self._copied_log_q = copied.log_p[:, 0]
        self._copy_under[parent] = nodes
        self._rescore_chains(self._chain)

    def _within_draft_len(self, chains: Chains) -> tuple[np.ndarray, np.ndarray]:
        """Return chain and depth of the tokens that their requests can still use: int64 [m] both."""
        above = chains.above
        left = self._max_draft_len[self.tree.request[above]] - self.tree.depth[above]
        chain, index = np.nonzero(chains.exists & (np.arange(chains.tokens.shape[1]) < left[:, None]))
        return chain, index

    def _add_chains(
        self, chains: Chains, chain: np.ndarray, index: np.ndarray, score: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Add the tokens at ``index`` of ``chain`` int64 [m] to the tree. Returns nodes and their parents."""
        tree, above = self.tree, chains.above[chain]
        nodes = len(tree) + np.arange(len(chain))
        parent = np.where(index == 0, above, nodes - 1)
        depth = tree.depth[above] + index + 1
        tree.add_chains(parent, chains.tokens[chain, index], tree.request[above], depth, score, chains.source[chain])
        return nodes, parent

    def _extend(self, probability: np.ndarray, expandable: bool) -> None:
        """Note the ``probability`` float64 [m] of nodes that the tree has got."""
        self._continuations = None
        self.probability = np.concatenate((self.probability, probability))
        self._expandable = np.concatenate((self._expandable, np.full(len(probability), expandable)))
        self._copy_under = np.concatenate((self._copy_under, np.full(len(probability), -1)))

    def _reweight_copies(self, copy: np.ndarray, same: np.ndarray, log_q: np.ndarray) -> None:
        """Raise the copied children that the head proposed, lower the others, and their chains.

        copy int64 [F]: copied child of an expanded node, -1 none. same int64 [F]: index of the equal head token, -1
        none. log_q float64 [F, k].
        """
        self._expandable[copy[copy >= 0]] = True
        expanded = np.flatnonzero(
            (copy >= 0) & (self.tree.source[copy] != GRAMMAR)
        )  # a head does not reweight forced tokens
        if len(expanded) == 0:
            return
        tree, nodes, same, q = self.tree, copy[expanded], same[expanded], np.exp(log_q[expanded])
        tree.source[nodes[same >= 0]] = BOTH
        request, depth = tree.request[nodes], tree.depth[nodes]
        log_a = self._copied_log_q[request]
        a, proposed = np.exp(log_a), q[np.arange(len(nodes)), same]
        left = np.maximum(1 - q.sum(axis=1), 0.02)  # however sure the head is
        rise, fall = np.log1p(-(1 - proposed) * (1 - a)) - log_a, np.log(left / (a * left + 1 - a))
        change = np.where(same >= 0, rise, fall).astype(np.float32)
        below = np.where(np.arange(self._chain.shape[1]) >= depth[:, None] - 1, self._chain[request], -1)
        row, _ = np.nonzero(below >= 0)
        tree.score[below[below >= 0]] += change[row]
        self._rescore_chains(self._chain[request])

    def _drop_challengers(self, nodes: np.ndarray) -> None:
        """Keep the likelier of the head's new ``nodes`` int64 [m] and the copied nodes under the same parents."""
        tree = self.tree
        challenger = self._copy_under[tree.parent[nodes]]
        nodes, challenger = nodes[challenger >= 0], challenger[challenger >= 0]
        copied = self.probability[challenger] > self.probability[nodes]
        self.probability[nodes[copied]] = 0
        for node in challenger[~copied].tolist():
            chain = self._chain[tree.request[node], tree.depth[node] - 1 :]
            self.probability[chain[chain >= 0]] = 0

    def _calibrated(self, nodes: np.ndarray) -> np.ndarray:
        tree = self.tree
        return self._acceptance.probability(tree.source[nodes], tree.depth[nodes], tree.score[nodes])

    def _rescore_chains(self, chains: np.ndarray) -> None:
        """Set the probabilities of ``chains`` int64 [m, L]: nodes from a root's child downwards, -1 beyond the end."""
        exists = chains >= 0
        probability = np.ones(chains.shape)
        probability[exists] = self._calibrated(chains[exists])
        self.probability[chains[exists]] = np.minimum.accumulate(probability, axis=1)[exists]


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


@compiled(
    "Tuple((i8[::1], i8[::1], f8[::1], i8[::1]))(i8[::1], b1[::1], i8[::1], i8[:, ::1], f8[:, ::1], i8[::1], f4[::1])"
)
def _children(
    parents: np.ndarray,
    fits: np.ndarray,
    copy: np.ndarray,
    token: np.ndarray,
    log_q: np.ndarray,
    known_token: np.ndarray,
    known_score: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the new ones of the head's children [F, k] of ``parents`` [F]: their parents, tokens and scores [m].

    Also returns the index of the child that a parent's ``copy`` [F] is, int64 [F], -1 none. In ``log_q`` low precision
    may have rounded log 1 to above 0, which is 0 again, or overflowed to nan, which is -inf: no child.
    """
    size, number = token.size, 0
    parent, new, score = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size)
    same = np.full(len(parents), -1)
    for i in range(len(parents)):
        for k in range(token.shape[1] if fits[i] else 0):
            log_q[i, k] = -np.inf if math.isnan(log_q[i, k]) else min(log_q[i, k], 0.0)
            if log_q[i, k] == -np.inf:
                continue
            if copy[i] >= 0 and known_token[copy[i]] == token[i, k]:
                same[i] = k
                continue
            parent[number], new[number] = parents[i], token[i, k]
            score[number] = known_score[parents[i]] + log_q[i, k]
            number += 1
    return parent[:number], new[:number], score[:number], same
