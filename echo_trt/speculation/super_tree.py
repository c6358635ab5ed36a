"""The super-tree: every request's draft tree, over the whole batch, as a structure of arrays."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from echo_trt.speculation.arrays import begins, compiled


@dataclass
class SuperTree:
    """Nodes of B trees. A parent always stands before its children.

    token    int64 [n]
    parent   int64 [n], -1 at a root
    request  int64 [n], 0 to B - 1
    depth    int64 [n], 0 at a root
    score    float32 [n], log path probability: S(node) = S(parent) + log q(token | path), 0 at a root
    source   int8 [n], the node's proposer, one of ``speculation.sources``; 0 at a root
    """

    token: np.ndarray
    parent: np.ndarray
    request: np.ndarray
    depth: np.ndarray
    score: np.ndarray
    source: np.ndarray
    num_requests: int

    @classmethod
    def from_roots(cls, tokens: np.ndarray) -> SuperTree:
        """Return trees without drafts: their roots are the requests' last ``tokens`` [B], not in the KV cache yet."""
        count = len(tokens)
        zero = np.zeros(count, np.int64)
        score, source = np.zeros(count, np.float32), np.zeros(count, np.int8)
        return cls(np.asarray(tokens, np.int64), zero - 1, np.arange(count), zero, score, source, count)

    def __len__(self) -> int:
        return len(self.token)

    @property
    def sizes(self) -> np.ndarray:
        """Number of nodes of each request, root included: int64 [B]."""
        return np.bincount(self.request, minlength=self.num_requests)

    @property
    def reached(self) -> np.ndarray:
        """Number of requests that have a node at a depth: int64 [deepest + 1]."""
        seen = np.zeros((self.num_requests, self.depth.max(initial=0) + 1), bool)
        seen[self.request, self.depth] = True
        reached: np.ndarray = seen.sum(axis=0)
        return reached

    def add(self, parent: np.ndarray, token: np.ndarray, score: np.ndarray, source: int = 0) -> np.ndarray:
        """Hang new nodes (all [m]) under existing ones. Returns their indices int64 [m]."""
        start = len(self)
        self.add_chains(parent, token, self.request[parent], self.depth[parent] + 1, score, source)
        return np.arange(start, len(self))

    def add_chains(
        self,
        parent: np.ndarray,
        token: np.ndarray,
        request: np.ndarray,
        depth: np.ndarray,
        score: np.ndarray,
        source: int | np.ndarray,
    ) -> None:
        """Add nodes (all [m]) whose parents may be among them, parents before children."""
        self.token = np.concatenate((self.token, token))
        self.parent = np.concatenate((self.parent, parent))
        self.request = np.concatenate((self.request, request))
        self.depth = np.concatenate((self.depth, depth))
        self.score = np.concatenate((self.score, score.astype(np.float32)))
        self.source = np.concatenate((self.source, np.zeros(len(parent), np.int8) + np.int8(source)))

    def with_roots(self, tokens: np.ndarray) -> SuperTree:
        """Return these trees and more behind them, which have nothing but a root: ``tokens`` int64 [m]."""
        if len(tokens) == 0:
            return self
        requests, zero = self.num_requests + np.arange(len(tokens)), np.zeros(len(tokens), np.int64)
        tree = replace(self, num_requests=self.num_requests + len(tokens))
        tree.add_chains(zero - 1, tokens, requests, depth=zero, score=zero, source=0)
        return tree

    def sorted_by_request(self, nodes: np.ndarray) -> tuple[SuperTree, np.ndarray]:
        """Return the part made of ``nodes``, request by request, and its nodes' indices in this tree, in that order.

        Parents still stand before children. A node whose parent is left out becomes a top (parent -1), so the part may
        be a forest.
        """
        nodes, parent = _by_request(np.ascontiguousarray(nodes, np.int64), self.parent, self.request, self.num_requests)
        token, request = self.token[nodes], self.request[nodes]
        depth, score, source = self.depth[nodes], self.score[nodes], self.source[nodes]
        return SuperTree(token, parent, request, depth, score, source, self.num_requests), nodes

    def best_first(self, nodes: np.ndarray, value: np.ndarray, limit: np.ndarray) -> np.ndarray:
        """Sort nodes by falling ``value`` float [m], keeping at most ``limit`` int64 [B] nodes per request."""
        return _best_first(nodes, self.request, value.astype(np.float64), limit)

    def ancestors_and_self(self, nodes: np.ndarray) -> np.ndarray:
        """Mark ``nodes`` and everything above them: bool [n]."""
        marked = np.zeros(len(self), bool)
        while len(nodes):
            marked[nodes] = True
            nodes = self.parent[nodes]
            nodes = nodes[nodes >= 0]
        return marked

    def best_paths(self, probability: np.ndarray, requests: np.ndarray) -> np.ndarray:
        """Mark the nodes to keep, bool [n]: of ``requests`` bool [B] the path of most expected tokens, of others all.

        probability  float64 [n], a node's P(accept)
        """
        expected = probability.astype(np.float64)
        for depth in range(1, int(self.depth.max(initial=0)) + 1):
            nodes = np.flatnonzero(self.depth == depth)
            expected[nodes] += expected[self.parent[nodes]]
        order = np.lexsort((expected, self.request))  # a request's best node comes last
        best = order[np.cumsum(self.sizes) - 1]
        marked: np.ndarray = self.ancestors_and_self(best) | ~requests[self.request]
        return marked


def ancestor_mask(tree: SuperTree) -> tuple[np.ndarray, np.ndarray]:
    """Return the operator's tree_mask uint8 [sum K_i^2], and where a request's matrix begins, int64 [B+1].

    A request's matrix is K_i x K_i, row-major: 1 where the row's node may attend the column's. ``tree`` must be sorted
    by request.
    """
    first, mask_begins = begins(tree.sizes), begins(tree.sizes**2)
    return _ancestor_mask(tree.parent, tree.request, first, mask_begins), mask_begins


@compiled("UniTuple(i8[::1], 2)(i8[::1], i8[::1], i8[::1], i8)")
def _by_request(
    chosen: np.ndarray, parent: np.ndarray, request: np.ndarray, requests: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sort ``chosen`` nodes [m] by request and index. Returns them, and their parents' new indices, int64 [m]."""
    is_chosen, new_index = np.zeros(len(parent), np.bool_), np.full(len(parent), -1)
    free = np.zeros(requests + 1, np.int64)  # the next new index of a request
    for node in chosen:
        is_chosen[node] = True
        free[request[node] + 1] += 1
    free = free.cumsum()
    nodes, new_parent = np.empty(len(chosen), np.int64), np.empty(len(chosen), np.int64)
    for node in range(len(parent)):  # a parent has its new index before its children
        if is_chosen[node]:
            new_index[node] = free[request[node]]
            free[request[node]] += 1
            nodes[new_index[node]] = node
            new_parent[new_index[node]] = new_index[parent[node]] if parent[node] >= 0 else -1
    return nodes, new_parent


@compiled("i8[::1](i8[::1], i8[::1], f8[::1], i8[::1])")
def _best_first(nodes: np.ndarray, request: np.ndarray, value: np.ndarray, limit: np.ndarray) -> np.ndarray:
    best, taken, number = np.empty(len(nodes), np.int64), np.zeros(len(limit), np.int64), 0
    for node in nodes[np.argsort(-value, kind="mergesort")]:
        if taken[request[node]] < limit[request[node]]:
            taken[request[node]] += 1
            best[number] = node
            number += 1
    return best[:number]


@compiled("u1[::1](i8[::1], i8[::1], i8[::1], i8[::1])")
def _ancestor_mask(parent: np.ndarray, request: np.ndarray, first: np.ndarray, mask_begins: np.ndarray) -> np.ndarray:
    mask = np.zeros(mask_begins[-1], np.uint8)
    for node in range(len(parent)):
        owner = request[node]
        size = first[owner + 1] - first[owner]
        row = mask_begins[owner] + (node - first[owner]) * size - first[owner]
        above = node
        while above >= 0:
            mask[row + above] = 1
            above = parent[above]
    return mask
