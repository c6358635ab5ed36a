"""Prompt lookup: the draft that costs nothing. What followed the last time these tokens stood in the text?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from echo_trt.decoding.super_tree import SuperTree
from echo_trt.runtime.slots import Slots


class LookupDrafter:
    """Continues each request's text from the latest place where its last tokens stood before.

    ``acceptance[m - 1]`` is the probability that a token copied after a match of m tokens is accepted; longer matches
    are worth the last one. Matches shorter than ``min_match`` are not used.
    """

    def __init__(self, state: Slots, min_match: int, acceptance: Sequence[float]):
        self.state, self.min_match = state, min_match
        self.log_acceptance = np.log(np.asarray(acceptance, np.float64))

    def begin(self, slots: np.ndarray) -> LookupDraft:
        return LookupDraft(self, slots)

    def observe(self, rows: np.ndarray, outputs: dict[str, np.ndarray], output_rows: np.ndarray) -> None:
        pass  # the text is all it knows

    def forget(self, slot: int) -> None:
        pass


class LookupDraft:
    """One iteration: a chain under each root that has a match."""

    def __init__(self, drafter: LookupDrafter, slots: np.ndarray):
        self._drafter = drafter
        state = drafter.state
        self._length = state.length[slots]
        self._text = state.tokens[slots, : self._length.max()]
        self._next, matched = (
            self._latest_match()
        )  # [B]: where the copied text begins, and on how many tokens it matched
        best = len(drafter.log_acceptance)
        self._log_q = drafter.log_acceptance[np.clip(matched, 1, best) - 1]
        self._log_q[matched < drafter.min_match] = -np.inf

    def _latest_match(self) -> tuple[np.ndarray, np.ndarray]:
        text, length = self._text, self._length
        rows, width = text.shape
        ends = np.arange(width)
        run = np.zeros(text.shape, np.int64)  # how many tokens that end here equal the text's last ones
        alive = ends[None, :] < (length - 1)[:, None]
        for back in range(len(self._drafter.log_acceptance)):
            last = text[np.arange(rows), np.maximum(length - 1 - back, 0)]
            alive[:, back:] &= text[:, : width - back] == last[:, None]
            alive[:, :back] = False
            run += alive
        end = (run * width + ends).argmax(axis=1)  # the longest match, of those the latest
        return end + 1, run[np.arange(rows), end]

    def expand_roots(self, requests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._log_q[requests, None], self._copied(requests, np.zeros(len(requests), np.int64))

    def expand(self, tree: SuperTree, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        requests, depth = tree.request[nodes], tree.depth[nodes]
        inside = self._next[requests] + depth < self._length[requests]
        log_q = np.where(inside, self._log_q[requests], -np.inf)
        return log_q[:, None], self._copied(requests, depth)

    def _copied(self, requests: np.ndarray, offset: np.ndarray) -> np.ndarray:
        place = np.minimum(self._next[requests] + offset, self._length[requests] - 1)
        return self._text[requests, place].astype(np.int64)[:, None]
