"""The bill of saved time: what plain decoding would have taken for the tokens of an iteration, less what it took."""

from __future__ import annotations

import math

import numpy as np

from echo_trt.speculation.arrays import ragged_arange
from echo_trt.speculation.planner import Iteration, PlainCost
from echo_trt.speculation.sources import DRAFT, SOURCES


class PlainClock:
    """Compares what passes of plain decoding take with what a model says; a factor corrects the model.

    error  standard error of the factor
    """

    def __init__(self, prior_error: float, memory: float, warm_up: int):
        """Begin with the factor 1. ``warm_up``: passes behind a verification that do not count."""
        self._memory, self._warm_up, self._row = memory, warm_up, 0
        self.factor, self._variance, self._known = 1.0, prior_error**2, 1.0

    @property
    def error(self) -> float:
        return math.sqrt(self._variance / self._known)

    def observe(self, plain: bool, seconds: float, expected: float) -> None:
        """Learn from an iteration; ``plain``: it decoded plainly, and computed no prompt."""
        self._row = self._row + 1 if plain else 0
        if self._row > self._warm_up:
            self._known = min(self._known + 1, 1 / (1 - self._memory))
            ahead = seconds / expected - self.factor
            self.factor += ahead / self._known
            self._variance += (ahead**2 - self._variance) / self._known


class Bill:
    """Sums since the start.

    saved  float64 [sources], seconds that plain decoding would have taken beyond those that it took. Accepted tokens
           bring them, and a verification's nodes share what it took beyond a plain pass; a network pays its passes
    error  seconds by which the sum may be wrong: its standard error
    """

    def __init__(self) -> None:
        self.saved, self.error = np.zeros(len(SOURCES)), 0.0

    def charge(
        self, iteration: Iteration, kept: np.ndarray, plain: PlainCost, proposer: int = DRAFT
    ) -> tuple[np.ndarray, np.ndarray]:
        """Add an iteration. Returns the seconds by which its B requests are ahead of plain decoding, and their errors.

        kept      int64 [B], tokens that a request's text has got
        proposer  source of the nodes that a draft proposed
        """
        tree, path, count = iteration.plan.tree, iteration.path, len(kept)
        if count == 0 or (len(tree) == count and not iteration.drafts):
            return np.zeros(count), np.zeros(count)
        seconds = plain.here + (kept - 1) * plain.each
        counts = np.bincount(tree.request[path], minlength=count)
        gained = path[ragged_arange(counts) < np.repeat(kept, counts)]
        source, drafted = np.maximum(tree.source, proposer), tree.depth > 0
        nodes = np.bincount(source[drafted], minlength=len(SOURCES)).astype(np.float64)
        if not drafted.any():
            nodes[proposer] = 1.0
        drafting = sum(each.seconds for each in iteration.drafts)
        self.saved += np.bincount(source[gained[tree.depth[gained] > 0]], minlength=len(SOURCES)) * plain.each / count
        self.saved -= (iteration.seconds - plain.here - drafting) * nodes / nodes.sum()
        self.saved[proposer] -= drafting
        self.error += plain.error * float(seconds.mean())
        return seconds - iteration.seconds, plain.error * seconds
