"""The candidates of one iteration: what the head drafts, the text itself suggests, and n-grams, in one super-tree."""

from __future__ import annotations

import math

import numpy as np

from echo_trt.decoding.arrays import compiled
from echo_trt.decoding.goodput.acceptance import BOTH, HEAD, LOOKUP, NGRAM, Acceptance
from echo_trt.decoding.goodput.ngrams import Chains, NGrams
from echo_trt.decoding.planner import Continuations
from echo_trt.decoding.super_tree import SuperTree

LEAST_LEFT = 0.02  # of a head's probability outside its proposals: it may be surer than it should be


class Candidates:
    """A super-tree with what each node is worth: probability float64 [n], and value [n], weighted by its request.

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
    ):
        """``one_path``: of two children of one node the less likely is given up, and what is below it, at probability
        0; the head proposes one a node."""
        self._one_path = one_path
        self.tree, self.weights, self._acceptance, self._room = tree, weights, acceptance, room
        self.probability = np.ones(len(tree))
        self._expandable = np.ones(len(tree), bool)  # its parent was expanded, so a head can expand it
        self._copy_under = np.full(len(tree), -1)  # node -> its copied child
        self._copied_log_q = np.zeros(0) if copied is None else copied.log_q
        self._chain = np.zeros((0, 0), np.int64)  # empty where nothing is copied
        self._continued: Chains | None = None  # by n-grams, of the leaves that there are now
        if copied is not None:
            self._hang(copied)

    def __len__(self) -> int:
        return len(self.tree)

    @property
    def value(self) -> np.ndarray:
        """Expected tokens, each weighed as its request is: float64 [n]."""
        value: np.ndarray = self.probability * self.weights[self.tree.request]
        return value

    def add(self, parents: np.ndarray, log_q: np.ndarray, tokens: np.ndarray, width: int) -> None:
        """The head's children of ``parents`` [F, 1]: log q and tokens [F, k], best first, of which ``width`` count."""
        self._continued = None
        tree, parents = self.tree, np.ascontiguousarray(parents[:, 0], np.int64)
        token = np.ascontiguousarray(tokens[:, :width], np.int64)
        log_q = np.array(log_q[:, :width], np.float64)
        room = self._room[tree.request[parents]] > tree.depth[parents]
        copy = self._copy_under[parents]
        number, parent, new, score, same = _children(parents, room, copy, token, log_q, tree.token, tree.score)
        if self._chain.size:
            agreed = np.flatnonzero(same >= 0)
            self._agree(copy[agreed], log_q[agreed, same[agreed]])
            self._disagree(copy, same, log_q)
            self._expandable[copy[copy >= 0]] = True
        nodes = self._append(parent[:number], new[:number], score[:number])
        if self._one_path and self._chain.size:
            self._give_up_rivals(nodes)

    def _give_up_rivals(self, nodes: np.ndarray) -> None:
        """Of the head's new ``nodes`` [m] and what is copied under the same parents, keep the more likely."""
        tree = self.tree
        rival = self._copy_under[tree.parent[nodes]]
        nodes, rival = nodes[rival >= 0], rival[rival >= 0]
        copied = self.probability[rival] > self.probability[nodes]
        self.probability[nodes[copied]] = 0
        for node in rival[~copied].tolist():
            chain = self._chain[tree.request[node], tree.depth[node] - 1 :]
            self.probability[chain[chain >= 0]] = 0

    def continued(self, ngrams: NGrams, recent: np.ndarray, max_depth: int) -> Chains:
        """What ``ngrams`` would put under the leaves that there are; ``recent`` as they say. Of one iteration all are
        the same: it is looked up once for the same leaves."""
        if self._continued is None:
            deepest, drift = np.minimum(self._room, max_depth), self._acceptance.drift[NGRAM]
            self._continued = ngrams.chains(self.tree, self.probability, recent, deepest, drift)
        return self._continued

    def go_on(self, chains: Chains) -> None:
        """Add what ``continued`` found of these candidates. Nothing is drafted below."""
        self._continued = None
        self.tree.add_chains(
            chains.parent, chains.token, chains.request, chains.depth, np.log(chains.probability), NGRAM
        )
        self._grow(len(chains.parent), expandable=False)
        self.probability[len(self.tree) - len(chains.parent) :] = chains.probability

    def frontier(self, depth: int, beams: int) -> np.ndarray:
        """Nodes of ``depth`` that may be expanded, best first: of each request its ``beams`` best."""
        tree = self.tree
        return _frontier(
            self._expandable, self.probability, self.weights, tree.depth, tree.request, self._room, depth, beams
        )

    def best_child(self, requests: np.ndarray) -> np.ndarray:
        """P(accept) of the best node of depth 1 of each of ``requests``, 0 where there is none."""
        tree = self.tree
        best: np.ndarray = _best_child(tree.depth, tree.request, self.probability, tree.num_requests)[requests]
        return best

    def _hang(self, copied: Continuations) -> None:
        """The chains, request by request; ``_chain`` [B, L] has their nodes, -1 beyond a chain's end."""
        request, place = _existing(copied.tokens, self._room)
        if len(request) == 0:
            return
        nodes = len(self.tree) + np.arange(len(request))
        parent = np.where(place == 0, request, nodes - 1)
        score = copied.log_q[request] * (place + 1)
        self.tree.add_chains(parent, copied.tokens[request, place], request, place + 1, score, LOOKUP)
        self._chain = np.full(copied.tokens.shape, -1)
        self._chain[request, place] = nodes
        self._grow(len(nodes), expandable=False)
        self._copy_under[parent] = nodes
        self._appraise_chains(self._chain)

    def _append(self, parent: np.ndarray, token: np.ndarray, score: np.ndarray) -> np.ndarray:
        nodes = self.tree.add(parent, token, score, HEAD)
        self._grow(len(nodes), expandable=True)
        # Tables are fitted depth by depth; a path cannot be likelier than its beginning.
        self.probability[nodes] = np.minimum(self._own(nodes), self.probability[parent])
        return nodes

    def _grow(self, count: int, expandable: bool) -> None:
        self.probability, self._expandable, self._copy_under = _longer(
            self.probability, self._expandable, self._copy_under, count, expandable
        )

    def _agree(self, nodes: np.ndarray, log_q: np.ndarray) -> None:
        """The head has proposed copied ``nodes`` with log q: they and the chains under them rise."""
        if len(nodes) == 0:
            return
        log_a = self._copied_log_q[self.tree.request[nodes]]
        self.tree.source[nodes] = BOTH
        self._shift(nodes, np.log1p(-(1 - np.exp(log_q)) * (1 - np.exp(log_a))) - log_a)

    def _disagree(self, copy: np.ndarray, same: np.ndarray, log_q: np.ndarray) -> None:
        """``copy`` [F]: copied children of what was expanded, -1 where there are none; those that none of the head's,
        with log q [F, k], is the ``same`` as, -1 in [F], fall, and so do the chains under them."""
        missed = np.flatnonzero((copy >= 0) & (same < 0))
        if len(missed) == 0:
            return
        left = np.maximum(1 - np.exp(log_q[missed]).sum(axis=1), LEAST_LEFT)
        a = np.exp(self._copied_log_q[self.tree.request[copy[missed]]])
        self._shift(copy[missed], np.log(left / (a * left + 1 - a)))

    def _shift(self, nodes: np.ndarray, change: np.ndarray) -> None:
        """Add ``change`` [m] to the scores of copied ``nodes`` [m], each of another request, and of those below."""
        tree = self.tree
        request, depth = tree.request[nodes], tree.depth[nodes]
        below = np.where(np.arange(self._chain.shape[1]) >= depth[:, None] - 1, self._chain[request], -1)
        row, _ = np.nonzero(below >= 0)
        tree.score[below[below >= 0]] += change[row].astype(np.float32)
        self._appraise_chains(self._chain[request])

    def _own(self, nodes: np.ndarray) -> np.ndarray:
        tree = self.tree
        return self._acceptance.probability(tree.source[nodes], tree.depth[nodes], tree.score[nodes])

    def _appraise_chains(self, chains: np.ndarray) -> None:
        """chains [m, L]: nodes from a root's child downwards, -1 beyond the end."""
        exists = chains >= 0
        own = np.ones(chains.shape)
        own[exists] = self._own(chains[exists])
        self.probability[chains[exists]] = np.minimum.accumulate(own, axis=1)[exists]


@compiled("i8[::1](b1[::1], f8[::1], f8[::1], i8[::1], i8[::1], i8[::1], i8, i8)")
def _frontier(
    expandable: np.ndarray,
    probability: np.ndarray,
    weights: np.ndarray,
    depth: np.ndarray,
    request: np.ndarray,
    room: np.ndarray,
    level: int,
    beams: int,
) -> np.ndarray:
    """Nodes of depth ``level`` that may be expanded, of requests with ``room`` for their children, best first."""
    nodes, worth, number = np.empty(len(depth), np.int64), np.empty(len(depth)), 0
    for node in range(len(depth)):
        if depth[node] == level and expandable[node] and probability[node] > 0 and room[request[node]] > level:
            nodes[number], worth[number] = node, probability[node] * weights[request[node]]
            number += 1
    best, taken, kept = np.empty(number, np.int64), np.zeros(len(room), np.int64), 0
    for place in np.argsort(-worth[:number], kind="mergesort"):
        node = nodes[place]
        if taken[request[node]] < beams:
            taken[request[node]] += 1
            best[kept] = node
            kept += 1
    return best[:kept]


@compiled("Tuple((f8[::1], b1[::1], i8[::1]))(f8[::1], b1[::1], i8[::1], i8, b1)")
def _longer(
    probability: np.ndarray, expandable: np.ndarray, copy_under: np.ndarray, count: int, expandables: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (
        np.concatenate((probability, np.zeros(count))),
        np.concatenate((expandable, np.full(count, expandables))),
        np.concatenate((copy_under, np.full(count, -1))),
    )


@compiled("UniTuple(i8[::1], 2)(i8[:, ::1], i8[::1])")
def _existing(tokens: np.ndarray, room: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Requests and places of ``tokens`` [B, L] up to each row's first -1 and its ``room`` [B]."""
    request, place, number = np.empty(tokens.size, np.int64), np.empty(tokens.size, np.int64), 0
    for row in range(len(tokens)):
        for column in range(min(tokens.shape[1], room[row])):
            if tokens[row, column] < 0:
                break
            request[number], place[number] = row, column
            number += 1
    return request[:number], place[:number]


@compiled("f8[::1](i8[::1], i8[::1], f8[::1], i8)")
def _best_child(depth: np.ndarray, request: np.ndarray, probability: np.ndarray, requests: int) -> np.ndarray:
    best = np.zeros(requests)
    for node in range(len(depth)):
        if depth[node] == 1:
            best[request[node]] = max(best[request[node]], probability[node])
    return best


_NEW = "Tuple((i8, i8[::1], i8[::1], f8[::1], i8[::1]))"


@compiled(f"{_NEW}(i8[::1], b1[::1], i8[::1], i8[:, ::1], f8[:, ::1], i8[::1], f4[::1])")
def _children(
    parents: np.ndarray,
    room: np.ndarray,
    copy: np.ndarray,
    token: np.ndarray,
    log_q: np.ndarray,
    known_token: np.ndarray,
    known_score: np.ndarray,
) -> tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The head's children [F, k] of ``parents`` [F] that have ``room``: how many are new, their parents, tokens and
    scores, and which of them each parent's ``copy`` [F] is, -1 for none. Of ``log_q``, where low precision has rounded
    log 1 to above 0, it is 0 again, and where it has overflowed to nan, -inf: no child."""
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
    return number, parent, new, score, same
