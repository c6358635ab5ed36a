"""Drafts without a network: their trees are pure functions, so a test can work out by itself what they would say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from forests import path_to

from echo_trt.speculation.drafts import Draft
from echo_trt.speculation.super_tree import SuperTree


class PathDraft(Draft):
    """A draft that is asked one path at a time: subclasses say what the ``children`` of a request's path are."""

    def __init__(self) -> None:
        self.expanded: list[int] = []  # the request of each node that was expanded

    def children(self, request: int, path: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """log q [k], best first, and tokens [k] of what may follow the drafted tokens ``path``."""
        raise NotImplementedError

    def expand_roots(self, requests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._expand((request, ()) for request in requests.tolist())

    def expand(self, tree: SuperTree, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._expand((int(tree.request[node]), drafted(tree, node)) for node in nodes)

    def _expand(self, indices) -> tuple[np.ndarray, np.ndarray]:
        indices = list(indices)
        self.expanded += [request for request, _ in indices]
        log_q, tokens = zip(*(self.children(*index) for index in indices), strict=True)
        return np.stack(log_q), np.stack(tokens)


class SeededDraft(PathDraft):
    """Each request has a random tree of its own, which depends on its seed alone.

    ``spread``: how flat the distributions are. ``missing``: how often some children, or all, do not exist.
    """

    def __init__(self, seeds: Sequence[int], k: int = 4, spread: float = 0.2, missing: float = 0.0):
        super().__init__()
        self.seeds, self.k, self.spread, self.missing = seeds, k, spread, missing

    def children(self, request: int, path: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng((self.seeds[request], *path))
        q = np.sort(rng.dirichlet(np.full(self.k + 3, self.spread)))[::-1][: self.k]
        log_q = np.log(np.maximum(q, 1e-12)).astype(np.float32)
        if rng.random() < self.missing:
            log_q[rng.integers(self.k + 1) :] = -np.inf
        return log_q, rng.permutation(3 * self.k)[: self.k]


class SteadyDraft(PathDraft):
    """Under any node of request i the children 0, 1, ... have the same probabilities, ``q[i]``."""

    def __init__(self, q: Sequence[Sequence[float]]):
        super().__init__()
        self.log_q = np.log(np.array(q, np.float32))

    def children(self, request: int, path: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        return self.log_q[request], np.arange(self.log_q.shape[1])


class NoDraft(Draft):
    """For where a draft must not be asked at all."""

    def expand_roots(self, requests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        raise AssertionError("the draft was asked")

    def expand(self, tree: SuperTree, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        raise AssertionError("the draft was asked")


def drafted(tree: SuperTree, node: int) -> tuple[int, ...]:
    """Return the tokens from below the root down to ``node``."""
    return tuple(tree.token[path_to(tree, node)[1:]].tolist())
