"""The bill of saved time: what plain decoding would have taken for the tokens of an iteration, less what it took."""

from __future__ import annotations

import math

import numpy as np

from echo_trt.speculation.arrays import ragged_arange
from echo_trt.speculation.planner import Iteration, PlainCost
from echo_trt.speculation.sources import DRAFT, SOURCES


class PlainClock:
    """What passes of plain decoding take at a load, as a factor of what a model says that does not change.

    Passes count by windows of one load: what is wrong by chance is the same within a window, and differs between two.
    """

    def __init__(self, prior_error: float, newest: float, warm_up: int, window: int):
        """Begin with nothing measured. ``newest``: weight of a load's newest window, at least. ``warm_up``: passes
        behind a verification that do not count. ``window``: passes of a window that do.
        """
        self._prior, self._newest, self._warm_up, self._window = prior_error**2, newest, warm_up, window
        self._loads: dict[int, list[float]] = {}  # windows, factor, variance; passes, seconds, expected
        self._row = 0

    def factor(self, load: int) -> tuple[float, float] | None:
        """Return the factor of a load class and its standard error, as a share of it; None before any window."""
        windows, factor, variance, *_ = self._loads.get(load, (0.0, 0.0, 0.0))
        return (factor, math.sqrt(variance / min(windows, 1 / self._newest))) if windows else None

    def observe(self, load: int, plain: bool, seconds: float, expected: float) -> None:
        """Learn from an iteration; ``plain``: it decoded plainly, and computed no prompt."""
        self._row = self._row + 1 if plain else 0
        if self._row <= self._warm_up:
            return
        known = self._loads.setdefault(load, [0.0, 0.0, self._prior, 0.0, 0.0, 0.0])
        known[3:] = known[3] + 1, known[4] + seconds, known[5] + expected
        if known[3] >= self._window:
            windows, factor, variance = known[0] + 1, known[1], known[2]
            ahead, weight = known[4] / known[5] - factor, max(1 / windows, self._newest)
            if windows > 1:
                variance += ((ahead / factor) ** 2 - variance) * weight
            known[:] = windows, factor + weight * ahead, variance, 0.0, 0.0, 0.0


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
