"""Prompt lookup, the draft that costs nothing: copies what followed earlier occurrences of the last tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from echo_trt.engine.batch import InputBatch
from echo_trt.engine.drafters.eagle3 import Drafter
from echo_trt.speculation.arrays import compiled
from echo_trt.speculation.chains import Chains
from echo_trt.speculation.drafts import KnownTrees, Proposals, TimedDraft
from echo_trt.speculation.sources import LOOKUP
from echo_trt.speculation.super_tree import SuperTree


class LookupDrafter(Drafter):
    """Continues a request's text from the latest earlier occurrence of its last tokens.

    ``acceptance[m - 1]`` is the probability that a token copied after a match of m tokens is accepted; longer matches
    are worth the last one. Matches shorter than ``min_match`` are not used.
    """

    source = LOOKUP

    def __init__(self, batch: InputBatch, min_match: int, acceptance: Sequence[float]):
        """Begin with ``acceptance``, probabilities above 0."""
        self.batch, self.min_match = batch, min_match
        self.log_acceptance = np.log(np.asarray(acceptance, np.float64))

    def draft_lag(self, slots: np.ndarray) -> np.ndarray:
        return np.zeros(len(slots), np.int64)

    def begin(self, slots: np.ndarray) -> LookupDraft:
        return LookupDraft(self, slots)

    def matches(self, slots: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ``length`` tokens behind the matches of ``slots`` [B], -1 for none: int64 [B, length].

        Where the text ends, the copy goes on with itself. Also returns the tokens that matched, 0 for none: int64 [B].
        """
        ends = self.batch.length[slots]
        text = self.batch.tokens[slots, : ends.max(initial=1)]
        begin, matched = _latest_match(text, ends, len(self.log_acceptance))
        position = begin[:, None] + np.arange(length) % np.maximum(ends - begin, 1)[:, None]
        found = (matched >= max(self.min_match, 1))[:, None]
        return np.where(found, np.take_along_axis(text, position, axis=1), -1).astype(np.int64), matched

    def chains(self, slots: np.ndarray, length: int) -> Chains:
        """Return a chain below each root of ``slots`` int64 [B], in that order, of ``length`` tokens at most."""
        return copied_chains(*self.matches(slots, length), self.log_acceptance)

    def observe(self, rows: np.ndarray, outputs: dict[str, np.ndarray], output_rows: np.ndarray) -> None:
        pass  # the text is all it knows

    def forget(self, slot: int) -> None:
        pass


def copied_chains(tokens: np.ndarray, matched: np.ndarray, log_acceptance: np.ndarray) -> Chains:
    """Return ``tokens`` int64 [B, L] as chains below B roots, by the log P(accept) of 1, 2, ... ``matched`` tokens."""
    log_p = log_acceptance[np.clip(matched, 1, len(log_acceptance)) - 1]
    source = np.full(len(tokens), LOOKUP, np.int8)
    return Chains(np.arange(len(tokens)), tokens, np.repeat(log_p[:, None], tokens.shape[1], axis=1), source)


class LookupDraft(TimedDraft):
    """One iteration: a chain under each root that has a match."""

    def __init__(self, drafter: LookupDrafter, slots: np.ndarray):
        super().__init__()
        self._drafter, self._slots = drafter, slots

    def propose_roots(self, requests: np.ndarray) -> Proposals:
        self._trees = KnownTrees.of_chains(self._drafter.chains(self._slots, self._drafter.batch.reserve))
        return self._trees.expand_roots(requests)

    def propose(self, tree: SuperTree, nodes: np.ndarray) -> Proposals:
        return self._trees.expand(tree, nodes)


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
