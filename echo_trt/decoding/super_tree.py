"""The super-tree: every request's draft tree, over the whole batch, as a structure of arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from echo_trt.decoding.arrays import compiled


@dataclass
class SuperTree:
    """Nodes of B trees. A parent always stands before its children.

    token int64 [n], parent int64 [n] (-1 at a root), request int64 [n] (0..B-1), depth int64 [n] (0 at a root),
    score float32 [n]: the log path probability, S(node) = S(parent) + log q(token | path), 0 at a root. source int8
    [n]: who proposed it (``acceptance``: HEAD, LOOKUP, BOTH or NGRAM).
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
        """One root a request: its pending token, which is committed but not yet in the KV cache. tokens [B]."""
        count = len(tokens)
        none = np.zeros(count, np.int64)
        score, source = np.zeros(count, np.float32), np.zeros(count, np.int8)
        return cls(np.asarray(tokens, np.int64), none - 1, np.arange(count), none, score, source, count)

    def __len__(self) -> int:
        return len(self.token)

    @property
    def sizes(self) -> np.ndarray:
        """K_i, the nodes of each request, root included: int64 [B]."""
        return np.bincount(self.request, minlength=self.num_requests)

    @property
    def reached(self) -> np.ndarray:
        """How many requests have a node at each depth: int64 [deepest + 1]."""
        return _reached(self.request, self.depth, self.num_requests)

    def add(self, parent: np.ndarray, token: np.ndarray, score: np.ndarray, source: int = 0) -> np.ndarray:
        """Hang new nodes (all [m]) under existing ones; returns their indices [m]."""
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
        source: int,
    ) -> None:
        """Add nodes (all [m]) whose parents may be among them, each before its children."""
        self.token = np.concatenate((self.token, token))
        self.parent = np.concatenate((self.parent, parent))
        self.request = np.concatenate((self.request, request))
        self.depth = np.concatenate((self.depth, depth))
        self.score = np.concatenate((self.score, score.astype(np.float32)))
        self.source = np.concatenate((self.source, np.zeros(len(parent), np.int8) + np.int8(source)))

    def sorted_by_request(self, nodes: np.ndarray) -> tuple[SuperTree, np.ndarray]:
        """The part made of ``nodes``, request by request, parents still before children.

        A node whose parent is left out becomes a top of its own (parent -1), so the part may be a forest. Returns it
        and its nodes' indices in this tree, in the new order.
        """
        nodes, parent = _by_request(np.ascontiguousarray(nodes, np.int64), self.parent, self.request, self.num_requests)
        part = SuperTree(
            self.token[nodes],
            parent,
            self.request[nodes],
            self.depth[nodes],
            self.score[nodes],
            self.source[nodes],
            self.num_requests,
        )
        return part, nodes

    def ancestors_and_self(self, nodes: np.ndarray) -> np.ndarray:
        """Mark ``nodes`` and everything above them: bool [n]."""
        marked = np.zeros(len(self), bool)
        while len(nodes):
            marked[nodes] = True
            nodes = self.parent[nodes]
            nodes = nodes[nodes >= 0]
        return marked


def ancestor_mask(tree: SuperTree) -> tuple[np.ndarray, np.ndarray]:
    """The operator's tree_mask: row-major K_i x K_i matrices, 1 where the row's node may attend the column's.

    ``tree`` must be sorted by request. Returns uint8 [sum K_i^2] and where each request's matrix begins, int64 [B+1].
    """
    return _ancestor_mask(tree.parent, tree.request, tree.num_requests)


@compiled("UniTuple(i8[::1], 2)(i8[::1], i8[::1], i8[::1], i8)")
def _by_request(
    chosen: np.ndarray, parent: np.ndarray, request: np.ndarray, requests: int
) -> tuple[np.ndarray, np.ndarray]:
    """``chosen`` nodes [m] request by request, each one's ascending, and the places of their parents among them."""
    place, begin = np.full(len(parent), -1), np.zeros(requests + 1, np.int64)
    for node in chosen:
        place[node] = 0
        begin[request[node] + 1] += 1
    for owner in range(requests):
        begin[owner + 1] += begin[owner]
    nodes, above = np.empty(len(chosen), np.int64), np.empty(len(chosen), np.int64)
    for node in range(len(parent)):
        if place[node] < 0:
            continue
        place[node] = own = begin[request[node]]
        begin[request[node]] += 1
        nodes[own] = node
        above[own] = place[parent[node]] if parent[node] >= 0 else -1  # a parent comes before its children
    return nodes, above


@compiled("Tuple((u1[::1], i8[::1]))(i8[::1], i8[::1], i8)")
def _ancestor_mask(parent: np.ndarray, request: np.ndarray, requests: int) -> tuple[np.ndarray, np.ndarray]:
    first, mask_begins = np.zeros(requests + 1, np.int64), np.zeros(requests + 1, np.int64)
    for owner in request:
        first[owner + 1] += 1
    for owner in range(requests):
        mask_begins[owner + 1] = mask_begins[owner] + first[owner + 1] ** 2
        first[owner + 1] += first[owner]
    mask = np.zeros(mask_begins[-1], np.uint8)
    for node in range(len(parent)):
        owner = request[node]
        size = first[owner + 1] - first[owner]
        row = mask_begins[owner] + (node - first[owner]) * size - first[owner]
        above = node
        while above >= 0:
            mask[row + above] = 1
            above = parent[above]
    return mask, mask_begins


@compiled("i8[::1](i8[::1], i8[::1], i8)")
def _reached(request: np.ndarray, depth: np.ndarray, requests: int) -> np.ndarray:
    levels = 1
    for node in range(len(depth)):
        levels = max(levels, depth[node] + 1)
    seen, reached = np.zeros((requests, levels), np.bool_), np.zeros(levels, np.int64)
    for node in range(len(depth)):
        if not seen[request[node], depth[node]]:
            seen[request[node], depth[node]] = True
            reached[depth[node]] += 1
    return reached
