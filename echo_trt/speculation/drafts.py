"""What proposes children: one interface, trees that are known beforehand, and a clock for drafts that take passes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from echo_trt.speculation.chains import Chains
from echo_trt.speculation.super_tree import SuperTree

Proposals = tuple[np.ndarray, np.ndarray]  # log q float [F, k], best first, -inf for none; and tokens int [F, k]
ROOT, UNKNOWN = -1, -2  # for an index of a known node


class Draft:
    """Proposes children in one iteration. ``looks_ahead``: whether it can run several levels at once."""

    looks_ahead = False

    def expand_roots(self, requests: np.ndarray) -> Proposals:
        """Propose children of the roots of ``requests`` int64 [A]."""
        raise NotImplementedError

    def expand(self, tree: SuperTree, nodes: np.ndarray) -> Proposals:
        """Propose children of ``nodes`` int64 [F], all of one depth."""
        raise NotImplementedError

    def look_ahead(self, depth: int, beams: int, width: int, maximum: int) -> None:
        """Let the next proposals draft trees down to ``depth``, where the draft ``looks_ahead``.

        These are ``expand_roots``, or ``expand`` of nodes of the depth that was drafted before, whose requests go on.
        Each level expands a request's ``beams`` best nodes by the draft's path probability; a node has ``width``
        children. ``expand`` of the nodes above ``depth`` then takes no pass: it proposes the beams of a level, and what
        else is among the ``maximum`` best nodes of a request. Beams and width stay the same in an iteration.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Pass:
    """One timed forward pass of a network.

    tokens        tokens computed, padding included
    context       cached tokens of the pass's requests
    seconds       wall-clock time
    node_context  cached tokens that tree nodes attend besides their roots, summed over the nodes
    together      passes that were timed together, this one among them; their time is divided equally
    """

    tokens: int
    context: int
    seconds: float
    node_context: int = 0
    together: int = 1


class TimedDraft(Draft):
    """A draft that notes what it takes; subclasses propose.

    passes   its forward passes so far; copied text takes none
    levels   how often it was asked
    seconds  spent in it
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.passes: list[Pass] = []
        self.levels, self.seconds = 0, 0.0
        self._clock, self._ran = clock, list[tuple[int, int]]()

    def propose_roots(self, requests: np.ndarray) -> Proposals:
        """Do as ``expand_roots``."""
        raise NotImplementedError

    def propose(self, tree: SuperTree, nodes: np.ndarray) -> Proposals:
        """Do as ``expand``."""
        raise NotImplementedError

    def ran(self, entries: int, context: int) -> None:
        """Note that proposing takes a pass of ``entries`` tokens, of requests with ``context`` cached tokens."""
        self._ran.append((entries, context))

    def expand_roots(self, requests: np.ndarray) -> Proposals:
        return self._timed(lambda: self.propose_roots(requests))

    def expand(self, tree: SuperTree, nodes: np.ndarray) -> Proposals:
        return self._timed(lambda: self.propose(tree, nodes))

    def _timed(self, propose: Callable[[], Proposals]) -> Proposals:
        self._ran, begin = [], self._clock()
        proposals = propose()
        seconds, passes = self._clock() - begin, len(self._ran)
        self.levels, self.seconds = self.levels + 1, self.seconds + seconds
        self.passes += [Pass(*ran, seconds / passes, together=passes) for ran in self._ran]
        return proposals


class KnownTrees(Draft):
    """Trees that are known before they are asked for: a device's, a recording's, a block's, or copied text.

    Their nodes below the roots stand in any order, but siblings side by side, best first. A node of the super-tree is
    found by its token among its parent's known children; what else stands there has no children.

    token, log_q  int [n], and float [n]: log-probability of the node below its parent
    first, count  int64 [n], of a node's children
    roots         the same two of the roots of B requests, int64 [B]
    """

    def __init__(
        self,
        token: np.ndarray,
        log_q: np.ndarray,
        first: np.ndarray,
        count: np.ndarray,
        roots: tuple[np.ndarray, np.ndarray],
    ):
        self._token, self._log_q, self._first, self._count, self._roots = token, log_q, first, count, roots
        self._known = np.full(len(roots[0]), ROOT)  # the known node of each node of the super-tree, roots first

    @classmethod
    def of_chains(cls, chains: Chains) -> KnownTrees:
        """Return trees of one chain per request."""
        exists, (requests, length) = chains.exists, chains.tokens.shape
        further = np.pad(exists[:, 1:], ((0, 0), (0, 1))).astype(np.int64)
        first = np.arange(requests * length)
        roots = first.reshape(requests, length)[:, 0], exists[:, 0].astype(np.int64)
        return cls(chains.tokens.ravel(), chains.log_p.ravel(), first + 1, further.ravel(), roots)

    def expand_roots(self, requests: np.ndarray) -> Proposals:
        return self._listed(*(column[requests] for column in self._roots))[:2]

    def expand(self, tree: SuperTree, nodes: np.ndarray) -> Proposals:
        self._known = np.concatenate((self._known, np.full(len(tree) - len(self._known), UNKNOWN)))
        self._known[nodes] = self._find(tree, nodes)
        return self._listed(*self._family(tree, nodes))[:2]

    def _find(self, tree: SuperTree, nodes: np.ndarray) -> np.ndarray:
        """Find what is known of ``nodes``, whose parents were expanded: int64 [F], UNKNOWN if nothing."""
        _, tokens, known = self._listed(*self._family(tree, tree.parent[nodes]))
        same = (tokens == tree.token[nodes][:, None]) & (known >= 0)
        found: np.ndarray = known[np.arange(len(nodes)), same.argmax(axis=1)]
        found[~same.any(axis=1)] = UNKNOWN
        return found

    def _family(self, tree: SuperTree, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return first and count of the children of ``nodes``, int64 [F] both."""
        known = self._known[nodes]
        inner, at_root = np.maximum(known, 0), known == ROOT
        first, count = (column[tree.request[nodes]] for column in self._roots)
        count = np.where(at_root, count, self._count[inner])
        return np.where(at_root, first, self._first[inner]), np.where(known == UNKNOWN, 0, count)

    def _listed(self, first: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return log q, tokens, and the known nodes int64 [F, w], UNKNOWN where there are fewer."""
        column = np.arange(max(int(count.max(initial=0)), 1))
        exists = column < count[:, None]
        node = np.where(exists, first[:, None] + column, 0)
        log_q = np.where(exists, self._log_q[node], np.float32(-np.inf)).astype(np.float32)
        return log_q, np.where(exists, self._token[node], 0).astype(np.int64), np.where(exists, node, UNKNOWN)
