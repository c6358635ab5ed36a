"""The candidates of one iteration: what the head drafts, the text itself suggests, and n-grams, in one super-tree."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from echo_trt.decoding.arrays import compiled
from echo_trt.decoding.goodput.model.acceptance import Acceptance
from echo_trt.decoding.goodput.model.ngrams import NO_CHAINS, Chains, NGrams
from echo_trt.decoding.planner import Continuations, Copier
from echo_trt.decoding.sources import BOTH, GRAMMAR, HEAD, LOOKUP, NGRAM
from echo_trt.decoding.super_tree import SuperTree


class Grammars(Copier, Protocol):
    """The grammars of running requests, as a source of candidates that cost nothing; it copies, too."""

    def constrained(self, slots: np.ndarray) -> np.ndarray:
        """Say which of ``slots`` [B] have a grammar: bool [B]."""

    def chains(self, tree: SuperTree, probability: np.ndarray, slots: np.ndarray, room: np.ndarray) -> Chains:
        """Return what grammars force behind the leaves of ``tree``, whose nodes have P(accept) ``probability`` [n].

        slots, room  int64 [B], of the requests; ``room`` is the largest depth of its nodes
        """


class Candidates:
    """A super-tree with probability float64 [n], P(accept), and value float64 [n], tokens weighted by request.

    Copied chains hang under the roots from the start. Where the head proposes a copied token too, the node stays one
    and rises: both may be right independently, 1 - (1 - q)(1 - a). Where it has other proposals, of q in all, the
    copied one falls, by Bayes' rule: were it right, the head would have missed it with 1 - q only.
    """

    def __init__(
        self,
        tree: SuperTree,
        acceptance: Acceptance,
        weights: np.ndarray,
        room: np.ndarray,
        copied: Continuations | None = None,
        one_path: bool = False,
        ngrams: NGrams | None = None,
        recent: np.ndarray | None = None,
        max_depth: int = 0,
        min_continuation: float = 0.0,
        grammars: Grammars | None = None,
        slots: np.ndarray | None = None,
    ):
        """Begin with the roots of ``tree`` and the chains of ``copied``.

        one_path  keep only the likelier child of a node; the other child and its descendants get probability 0
        recent    int64 [B, ...]: tokens before a root, -1 none, for ``ngrams``, which continue leaves to ``max_depth``
                  while P(accept) is ``min_continuation`` or more
        slots     int64 [B], whose ``grammars``, where a request has one, continue leaves in the n-grams' place
        """
        self.tree, self.weights, self._acceptance, self._room = tree, weights, acceptance, room
        self._one_path, self._ngrams, self._recent = one_path, ngrams, recent
        self._min_continuation = min_continuation
        self._deepest = np.minimum(room, max_depth)  # of n-grams
        self._grammars, self._slots = grammars, slots
        if grammars is not None and slots is not None:
            self._deepest = np.where(grammars.constrained(slots), 0, self._deepest)
        self.probability = np.ones(len(tree))
        self._expandable = np.ones(len(tree), bool)  # its parent was expanded, so a head can expand it
        self._copy_under = np.full(len(tree), -1)  # node -> its copied child
        self._chain = np.zeros((0, 0), np.int64)  # [B, L]: nodes of the copied chains, -1 beyond a chain's end
        self._continuations: Chains | None = None  # of the leaves of the present tree
        if copied is not None:
            self._hang(copied)

    @property
    def value(self) -> np.ndarray:
        """Expected tokens, weighted by request: float64 [n]."""
        value: np.ndarray = self.probability * self.weights[self.tree.request]
        return value

    def add(self, parents: np.ndarray, log_q: np.ndarray, tokens: np.ndarray, width: int) -> None:
        """Add the head's children of ``parents`` int64 [F]: log q and tokens [F, k], best first, ``width`` at most."""
        tree, token = self.tree, np.ascontiguousarray(tokens[:, :width], np.int64)
        log_q = np.array(log_q[:, :width], np.float64)
        room = self._room[tree.request[parents]] > tree.depth[parents]
        copy = self._copy_under[parents]
        parent, new, score, same = _children(parents, room, copy, token, log_q, tree.token, tree.score)
        if self._chain.size:
            self._judge_copies(copy, same, log_q)
        nodes = tree.add(parent, new, score, HEAD)
        # Tables are fitted depth by depth; a path cannot be likelier than its beginning.
        self._extend(np.minimum(self._calibrated(nodes), self.probability[parent]), expandable=True)
        if self._one_path and self._chain.size:
            self._drop_rivals(nodes)

    def continuations(self) -> Chains:
        """Return what n-grams and grammars put behind the current leaves, cached until the tree grows."""
        if self._continuations is None:
            self._continuations = NO_CHAINS
            if self._ngrams and self._recent is not None:
                bounds = self._deepest, float(self._acceptance.bias[NGRAM, 0]), self._min_continuation
                self._continuations = self._ngrams.chains(self.tree, self.probability, self._recent, *bounds)
            if self._grammars is not None and self._slots is not None:
                forced = self._grammars.chains(self.tree, self.probability, self._slots, self._room)
                self._continuations = self._continuations.followed_by(forced, len(self.tree))
        return self._continuations

    def append_continuations(self) -> None:
        """Add these continuations to the tree. Nothing is drafted below them."""
        chains = self.continuations()
        score = np.log(chains.probability)
        source = NGRAM if chains.forced is None else np.where(chains.forced, GRAMMAR, NGRAM)
        self.tree.add_chains(chains.parent, chains.token, chains.request, chains.depth, score, source)
        self._extend(chains.probability, expandable=False)

    def frontier(self, depth: int, beams: int) -> np.ndarray:
        """Return nodes of ``depth`` that may be expanded, best first, at most ``beams`` a request: int64 [F]."""
        tree = self.tree
        worth, room = self._expandable & (self.probability > 0), self._room
        nodes = _of_depth(tree.depth, tree.request, worth, room, depth)
        return tree.best_first(nodes, self.value[nodes], np.full(tree.num_requests, beams))

    def promising(self, depth: int, most: int) -> np.ndarray:
        """Return the nodes of ``depth`` among the ``most`` best candidates, ascending: int64 [F].

        A child is worth its parent at most, so that expanding these alone, depth by depth, finds the ``most`` best
        nodes of all trees: best-first search (DDTree, arXiv 2604.12989).
        """
        value, roots = self.value, self.tree.num_requests
        least = np.partition(value[roots:], -most)[-most] if len(value) - roots > most > 0 else 0.0
        worth = self._expandable & (self.probability > 0) & (value >= least)
        return _of_depth(self.tree.depth, self.tree.request, worth, self._room, depth)

    def _hang(self, copied: Continuations) -> None:
        """Hang the copied chains under the roots, request by request, as far as texts and room go."""
        tokens = copied.tokens
        exists = np.logical_and.accumulate(tokens >= 0, axis=1)
        request, place = np.nonzero(exists & (np.arange(tokens.shape[1]) < self._room[:, None]))
        if len(request) == 0:
            return
        nodes = len(self.tree) + np.arange(len(request))
        parent = np.where(place == 0, request, nodes - 1)
        score = copied.log_q[request] * (place + 1)
        source = LOOKUP if copied.forced is None else np.where(copied.forced, GRAMMAR, LOOKUP)[request]
        self.tree.add_chains(parent, tokens[request, place], request, place + 1, score, source)
        self._extend(np.zeros(len(nodes)), expandable=False)
        self._chain = np.full(tokens.shape, -1)
        self._chain[request, place] = nodes
        self._copied_log_q = copied.log_q
        self._copy_under[parent] = nodes
        self._appraise_chains(self._chain)

    def _extend(self, probability: np.ndarray, expandable: bool) -> None:
        """Note the ``probability`` float64 [m] of nodes that the tree has got."""
        self._continuations = None
        self.probability = np.concatenate((self.probability, probability))
        self._expandable = np.concatenate((self._expandable, np.full(len(probability), expandable)))
        self._copy_under = np.concatenate((self._copy_under, np.full(len(probability), -1)))

    def _judge_copies(self, copy: np.ndarray, same: np.ndarray, log_q: np.ndarray) -> None:
        """Raise the copied children that the head proposed, lower the others, and their chains.

        copy int64 [F]: copied child of an expanded node, -1 none. same int64 [F]: index of the equal head token, -1
        none. log_q float64 [F, k].
        """
        self._expandable[copy[copy >= 0]] = True
        expanded = np.flatnonzero((copy >= 0) & (self.tree.source[copy] != GRAMMAR))  # what is forced, no head judges
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
        self._appraise_chains(self._chain[request])

    def _drop_rivals(self, nodes: np.ndarray) -> None:
        """Keep the likelier of the head's new ``nodes`` int64 [m] and the copied nodes under the same parents."""
        tree = self.tree
        rival = self._copy_under[tree.parent[nodes]]
        nodes, rival = nodes[rival >= 0], rival[rival >= 0]
        copied = self.probability[rival] > self.probability[nodes]
        self.probability[nodes[copied]] = 0
        for node in rival[~copied].tolist():
            chain = self._chain[tree.request[node], tree.depth[node] - 1 :]
            self.probability[chain[chain >= 0]] = 0

    def _calibrated(self, nodes: np.ndarray) -> np.ndarray:
        tree = self.tree
        return self._acceptance.probability(tree.source[nodes], tree.depth[nodes], tree.score[nodes])

    def _appraise_chains(self, chains: np.ndarray) -> None:
        """Set the probabilities of ``chains`` int64 [m, L]: nodes from a root's child downwards, -1 beyond the end."""
        exists = chains >= 0
        probability = np.ones(chains.shape)
        probability[exists] = self._calibrated(chains[exists])
        self.probability[chains[exists]] = np.minimum.accumulate(probability, axis=1)[exists]


@compiled("i8[::1](i8[::1], i8[::1], b1[::1], i8[::1], i8)")
def _of_depth(depth: np.ndarray, request: np.ndarray, worth: np.ndarray, room: np.ndarray, level: int) -> np.ndarray:
    """Return nodes of depth ``level`` that are ``worth`` it, of requests with ``room`` for their children."""
    nodes, number = np.empty(len(depth), np.int64), 0
    for node in range(len(depth)):
        if depth[node] == level and worth[node] and room[request[node]] > level:
            nodes[number] = node
            number += 1
    return nodes[:number]


@compiled(
    "Tuple((i8[::1], i8[::1], f8[::1], i8[::1]))(i8[::1], b1[::1], i8[::1], i8[:, ::1], f8[:, ::1], i8[::1], f4[::1])"
)
def _children(
    parents: np.ndarray,
    room: np.ndarray,
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
        for k in range(token.shape[1] if room[i] else 0):
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
