"""Prompt lookup, the draft that costs nothing: copies what followed earlier occurrences of the last tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from echo_trt.decoding.arrays import compiled
from echo_trt.decoding.planner import Continuations
from echo_trt.decoding.super_tree import SuperTree
from echo_trt.runtime.slots import Slots


class LookupDrafter:
    """Continues a request's text from the latest place where its last tokens stood before.

    ``acceptance[m - 1]`` is the probability that a token copied after a match of m tokens is accepted; longer matches
    are worth the last one. Matches shorter than ``min_match`` are not used.
    """

    def __init__(self, state: Slots, min_match: int, acceptance: Sequence[float]):
        self.state, self.min_match = state, min_match
        self.set_acceptance(acceptance)

    def set_acceptance(self, acceptance: Sequence[float]) -> None:
        """``acceptance`` as the class says; probabilities above 0."""
        self.log_acceptance = np.log(np.asarray(acceptance, np.float64))

    def behind(self, slots: np.ndarray) -> np.ndarray:
        return np.zeros(len(slots), np.int64)

    def begin(self, slots: np.ndarray) -> LookupDraft:
        return LookupDraft(self, slots)

    def continuations(self, slots: np.ndarray, length: int) -> Continuations:
        """Return the next ``length`` tokens after the latest matches, to stand beside another draft's."""
        return LookupDraft(self, slots).continuations(length)

    def observe(self, rows: np.ndarray, outputs: dict[str, np.ndarray], output_rows: np.ndarray) -> None:
        pass  # the text is all it knows

    def forget(self, slot: int) -> None:
        pass


class LookupDraft:
    """One iteration: a chain under each root that has a match."""

    def __init__(self, drafter: LookupDrafter, slots: np.ndarray):
        self._drafter = drafter
        self.entries = self.context = 0
        state, best = drafter.state, len(drafter.log_acceptance)
        self._length = state.length[slots]
        self._text = state.tokens[slots, : self._length.max()]
        # [B]: where the copied text begins, and on how many tokens it matched
        self._next, self._matched = _latest_match(self._text, self._length, best)
        self._log_q = _log_q(self._matched, drafter.min_match, drafter.log_acceptance)

    def continuations(self, length: int) -> Continuations:
        """See LookupDrafter.continuations."""
        end = np.where(self._log_q > -np.inf, self._length, 0)
        return Continuations(_stretches(self._text, self._next, end, length), self._log_q, self._matched)

    def expand_roots(self, requests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._log_q[requests, None], self._copied(requests, np.zeros(len(requests), np.int64))

    def expand(self, tree: SuperTree, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        requests, depth = tree.request[nodes], tree.depth[nodes]
        inside = self._next[requests] + depth < self._length[requests]
        log_q = np.where(inside, self._log_q[requests], -np.inf)
        return log_q[:, None], self._copied(requests, depth)

    def _copied(self, requests: np.ndarray, offset: np.ndarray) -> np.ndarray:
        place = np.minimum(self._next[requests] + offset, self._length[requests] - 1)
        tokens: np.ndarray = self._text[requests, place].astype(np.int64)
        return tokens[:, None]


@compiled("UniTuple(i8[::1], 2)(i4[:, :], i8[::1], i8)")
def _latest_match(text: np.ndarray, length: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the longest, then latest, earlier occurrence of a row's last tokens, up to ``longest`` of them.

    text int32 [B, W]; length int64 [B]. Returns begin int64 [B], the index after the match, and matched int64 [B]
    tokens, 0 for none.
    """
    begin, matched = np.zeros(len(text), np.int64), np.zeros(len(text), np.int64)
    for row in range(len(text)):
        words, last = text[row], length[row] - 1
        for end in range(last - 1, -1, -1):
            run = 0
            while run < longest and run <= end and words[end - run] == words[last - run]:
                run += 1
            if run > matched[row]:
                begin[row], matched[row] = end + 1, run
            if run == longest:
                break
    return begin, matched


@compiled("f8[::1](i8[::1], i8, f8[::1])")
def _log_q(matched: np.ndarray, min_match: int, log_acceptance: np.ndarray) -> np.ndarray:
    log_q = np.full(len(matched), -np.inf)
    for row in range(len(matched)):
        if matched[row] >= max(min_match, 1):
            log_q[row] = log_acceptance[min(matched[row], len(log_acceptance)) - 1]
    return log_q


@compiled("i8[:, ::1](i4[:, :], i8[::1], i8[::1], i8)")
def _stretches(text: np.ndarray, begin: np.ndarray, end: np.ndarray, length: int) -> np.ndarray:
    """Copy rows of ``text`` int32 [B, W] from ``begin`` to ``end`` int64 [B], -1 beyond: int64 [B, length]."""
    tokens = np.full((len(text), length), -1)
    for row in range(len(text)):
        for place in range(min(length, end[row] - begin[row])):
            tokens[row, place] = text[row, begin[row] + place]
    return tokens
