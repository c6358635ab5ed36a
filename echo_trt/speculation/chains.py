"""Draft tokens in a row that take no pass: copied text, n-grams, and what a grammar forces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

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

    def followed_by(self, others: Chains) -> Chains:
        """Return these chains and then ``others``."""
        length = max(self.tokens.shape[1], others.tokens.shape[1])

        def joined(name: str, beyond: float) -> np.ndarray:
            parts = (getattr(self, name), getattr(others, name))
            widened = (np.pad(p, ((0, 0), (0, length - p.shape[1])), constant_values=beyond) for p in parts)
            return np.concatenate(list(widened))

        above, source = (np.concatenate((a, b)) for a, b in ((self.above, others.above), (self.source, others.source)))
        return Chains(above, joined("tokens", -1), joined("log_p", 0.0), source)


_NONE = np.zeros(0, np.int64)
NO_CHAINS = Chains(_NONE, np.zeros((0, 0), np.int64), np.zeros((0, 0)), _NONE)


class PromptLookup(Protocol):
    """A source of chains that follow the roots, such as text copied from the request itself."""

    def chains(self, slots: np.ndarray, length: int) -> Chains:
        """Return a chain below each root of ``slots`` int64 [B], in that order, of ``length`` tokens at most.

        All tokens of a chain have the same P(accept).
        """
