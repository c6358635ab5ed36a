"""Draft tokens in a row that take no pass: copied text, n-grams, and what a grammar forces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Chains:
    """Chains of draft tokens below nodes of a tree.

    above   int64 [m], the node under which a chain hangs
    tokens  int64 [m, L], -1 from a chain's end on
    log_p   float64 [m, L], log P(a token is accepted, if those before it are)
    source  int8 [m], a chain's proposer, one of ``speculation.sources``
    """

    above: np.ndarray
    tokens: np.ndarray
    log_p: np.ndarray
    source: np.ndarray

    @property
    def exists(self) -> np.ndarray:
        """Whether there is a token: bool [m, L]."""
        exists: np.ndarray = np.logical_and.accumulate(self.tokens >= 0, axis=1)
        return exists

    @classmethod
    def joined(cls, several: Sequence[Chains]) -> Chains:
        """Return the chains of ``several``, one or more, as long as the longest."""
        above, source = (np.concatenate([getattr(chains, name) for chains in several]) for name in ("above", "source"))
        shape = len(above), max(chains.tokens.shape[1] for chains in several)
        tokens, log_p, begin = np.full(shape, -1), np.zeros(shape), 0
        for chains in several:
            part = slice(begin, begin + len(chains.above)), slice(chains.tokens.shape[1])
            tokens[part], log_p[part], begin = chains.tokens, chains.log_p, part[0].stop
        return cls(above, tokens, log_p, source)

    def best_below_each(self) -> Chains:
        """Return of the chains below a node the one of which most tokens are expected."""
        expected = np.where(self.exists, np.exp(self.log_p.cumsum(axis=1)), 0.0).sum(axis=1)
        order = np.lexsort((-expected, self.above))
        kept = order[np.diff(self.above[order], prepend=-1) > 0]
        return Chains(self.above[kept], self.tokens[kept], self.log_p[kept], self.source[kept])


NO_CHAINS = Chains(np.zeros(0, np.int64), np.zeros((0, 0), np.int64), np.zeros((0, 0)), np.zeros(0, np.int8))
